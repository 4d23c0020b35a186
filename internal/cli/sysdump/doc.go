// Package sysdump packs what helps to understand a mesh into one archive, without what is secret in it.
//
// It owns the archive and what is taken out of each file. What is collected, its callers know.
package sysdump
