-- What stands before the code of an EnvoyFilter, in one line, so that lines in messages are those of the code. The code runs
-- in the proxy's process, under the identity of its pod: it gets no files, programs, libraries or other code, and its own
-- requests go to services of the mesh alone, not to where the proxy has its keys from.
do
  local raise, kind, metatable, raw, match = error, type, getmetatable, rawset, string.match
  local clock = {time = os.time, clock = os.clock, date = os.date, difftime = os.difftime}
  local guarded, handlers, globals = {}, {}, _G
  for _, name in ipairs({"io", "package", "require", "module", "debug", "jit", "ffi", "load", "loadstring", "loadfile", "dofile", "getfenv", "setfenv", "newproxy"}) do globals[name] = nil end
  globals.os = clock
  string.dump = nil
  rawset = function(t, k, v) if t == globals then raise("an EnvoyFilter's code sets its globals by assignment") end return raw(t, k, v) end
  local function guard(handle)
    local m = metatable(handle)
    if guarded[m] then return end
    guarded[m] = true
    local methods = m.__index or m
    local call = methods.httpCall
    raw(methods, "httpCall", function(self, cluster, ...)
      local port, host = nil, nil
      if kind(cluster) == "string" then port, host = match(cluster, "^outbound|(%d+)||([%w.*-]+)$") end
      if not port then raise("an EnvoyFilter's code sends requests to outbound|port||host alone", 2) end
      return call(self, "outbound|" .. port .. "|http|" .. host, ...)
    end)
  end
  setmetatable(globals, {
    __metatable = false,
    __index = handlers,
    __newindex = function(t, k, v)
      if k ~= "envoy_on_request" and k ~= "envoy_on_response" then return raw(t, k, v) end
      if kind(v) ~= "function" then handlers[k] = nil return end
      handlers[k] = function(handle) guard(handle) return v(handle) end
    end,
  })
end
