// Package fetch gets what somebody wrote the address of into an object of the cluster. Whoever may write one must not thereby
// reach what only the control plane reaches: names are resolved once, every address is judged, and the connection goes to an
// address that was judged. That holds for redirects too.
//
// What was fetched last is kept when a later attempt fails. It must not know what anything that it fetches is for.
package fetch
