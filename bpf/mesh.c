//go:build ignore

/* SPDX-License-Identifier: GPL-2.0 */
/* The kernel side of Warren. One compilation unit; a header per family of hooks, in the order of a connection. */

#include "types.h"
#include "maps.h"
#include "decide.h"
#include "near.h"

#include "connect.h"
#include "sockops.h"
#include "lookup.h"
#include "guard.h"

char _license[] SEC("license") = "GPL";
