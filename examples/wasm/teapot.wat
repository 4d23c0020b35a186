;; A module for proxies (github.com/proxy-wasm/spec, 0.2.1): it answers requests for /teapot, and adds a header to what others
;; answer. teapot.wasm is what wat2wasm makes of it.
(module
  (import "env" "proxy_add_header_map_value" (func $add (param i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_get_header_map_value" (func $get (param i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_send_local_response" (func $answer (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) ":path")
  (data (i32.const 8) "x-by")
  (data (i32.const 16) "wasm")
  (data (i32.const 24) "short and stout")
  (func (export "proxy_abi_version_0_2_1"))
  ;; What the proxy writes to the module is at 4096.
  (func (export "proxy_on_memory_allocate") (param i32) (result i32) (i32.const 4096))
  (func (export "proxy_on_context_create") (param i32 i32))
  (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
    (if (call $get (i32.const 0) (i32.const 0) (i32.const 5) (i32.const 64) (i32.const 68)) (then (return (i32.const 0))))
    (if (i32.ne (i32.load (i32.const 68)) (i32.const 7)) (then (return (i32.const 0))))
    (if (i64.ne
          (i64.and (i64.load align=1 (i32.load (i32.const 64))) (i64.const 0x00ffffffffffffff))
          (i64.const 0x00746f706165742f)) ;; "/teapot"
      (then (return (i32.const 0))))
    (drop (call $answer (i32.const 418) (i32.const 0) (i32.const 0) (i32.const 24) (i32.const 15) (i32.const 0) (i32.const 0) (i32.const -1)))
    (i32.const 1))
  (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32)
    (drop (call $add (i32.const 2) (i32.const 8) (i32.const 4) (i32.const 16) (i32.const 4)))
    (i32.const 0)))
