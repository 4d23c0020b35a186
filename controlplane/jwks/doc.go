// Package jwks fetches the key sets that verify tokens, as package fetch does. It must not know what the keys are for.
package jwks
