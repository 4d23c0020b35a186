// A Wasm module for proxies, for the tests of test/interop.
module github.com/warrenmesh/warren/test/interop/plugin

go 1.26.0

require github.com/proxy-wasm/proxy-wasm-go-sdk v0.0.0-20250212164326-ab4161dcf924
