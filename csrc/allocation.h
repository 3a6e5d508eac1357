// Large blocks that a library frees are given out again. See allocation.cpp.
#pragma once

namespace synthward {

// Whether the large blocks of a library (by its file's name) come from malloc from now on. Only where glibc would not use them again, and not
// where another allocator has been put in glibc's place. Safe to call again.
bool reuse_freed_blocks(const char* library);

}  // namespace synthward
