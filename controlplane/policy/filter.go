package policy

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"cel.dev/cel-go/common"
	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/parser"
)

// maxFilter is how long an expression may be, in bytes: it is evaluated for every request.
const maxFilter = 4096

// What expressions of access logs may be made of: Envoy's attributes, and what its CEL has been built with. An expression
// that Envoy cannot build would have it refuse the listener.
var (
	filterAttributes = []string{"request", "response", "connection", "upstream", "source", "destination", "metadata", "filter_state", "upstream_filter_state", "xds"}
	filterFunctions  = []string{
		"_&&_", "_||_", "!_", "_==_", "_!=_", "_<_", "_<=_", "_>_", "_>=_", "@in", "_[_]", "_?_:_", "_+_", "_-_", "_*_", "_/_", "_%_", "-_",
		"size", "contains", "startsWith", "endsWith", "matches", "timestamp", "duration",
	}
)

// FilterProblem says what is wrong with an expression of an access log; "" is nothing.
func FilterProblem(expression string) string {
	switch {
	case strings.TrimSpace(expression) == "":
		return "the expression is empty; remove the filter, or write one as in response.code >= 400"
	case len(expression) > maxFilter:
		return fmt.Sprintf("the expression has %d bytes, of which there may be %d", len(expression), maxFilter)
	}
	p, err := parser.NewParser(parser.Macros(parser.AllMacros...), parser.MaxRecursionDepth(64))
	if err != nil {
		return "the expression cannot be read: " + err.Error()
	}
	parsed, errs := p.Parse(common.NewTextSource(expression))
	if errs != nil && len(errs.GetErrors()) > 0 {
		first := errs.GetErrors()[0]
		return fmt.Sprintf("at column %d of line %d the expression is not CEL: %s", first.Location.Column()+1, first.Location.Line(), first.Message)
	}
	problem := ""
	ast.PreOrderVisit(parsed.Expr(), ast.NewExprVisitor(func(e ast.Expr) {
		if problem != "" {
			return
		}
		switch e.Kind() {
		case ast.IdentKind:
			if name := e.AsIdent(); !slices.Contains(filterAttributes, name) {
				problem = fmt.Sprintf("there is no attribute %s; there are %s", quote(name), strings.Join(filterAttributes, ", "))
			}
		case ast.CallKind:
			if name := e.AsCall().FunctionName(); !slices.Contains(filterFunctions, name) {
				problem = fmt.Sprintf("the function %s cannot be had in an access log's filter", quote(name))
			} else if name == "matches" {
				problem = constantPattern(e.AsCall())
			}
		case ast.ComprehensionKind:
			problem = "macros that go through lists (all, exists, map, filter) cannot be had in an access log's filter"
		case ast.StructKind:
			problem = "messages cannot be had in an access log's filter"
		}
	}))
	return problem
}

// constantPattern wants a pattern to be a text that is a regular expression.
func constantPattern(call ast.CallExpr) string {
	args := call.Args()
	if len(args) == 0 || args[len(args)-1].Kind() != ast.LiteralKind {
		return "the pattern of matches has to be a text in quotes"
	}
	text, ok := args[len(args)-1].AsLiteral().Value().(string)
	if !ok {
		return "the pattern of matches has to be a text in quotes"
	}
	if _, err := regexp.Compile(text); err != nil {
		return fmt.Sprintf("the pattern %s of matches is not a regular expression: %v", quote(text), err)
	}
	return ""
}
