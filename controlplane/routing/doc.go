// Package routing turns what users write about HTTP into the rules of package mesh. It is pure: it knows one object at a
// time and neither what else there is nor who asks. What it cannot express it says in words for the author, and never
// leaves out silently: a rule that would mean something else without it fails its requests instead.
package routing
