// glibc before 2.38 hardly ever gives a freed block out again through posix_memalign (its bug 14581): it looks for a
// block larger than the one that was asked for by the alignment, so that one of exactly that size, which is what a
// training step freed a moment ago, never fits. Torch takes all of its memory that way, and a step that keeps some
// blocks while it frees others between them (activations and output gradients, until the clip factors are known)
// then holds a third more memory than it uses. So the library that takes its memory (torch's core, named by the caller)
// is made to ask malloc for large blocks: they are aligned to 16 bytes, as those that torch takes from NumPy, and are
// freed as before.
#include "allocation.h"

#include <cstdlib>  // says which C library this is

#if defined(__linux__) && defined(__GLIBC__) && (defined(__x86_64__) || defined(__aarch64__))
#include <dlfcn.h>
#include <elf.h>
#include <gnu/libc-version.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>

namespace synthward {
namespace {

#if defined(__x86_64__)
constexpr uint32_t kJumpSlot = R_X86_64_JUMP_SLOT, kGlobal = R_X86_64_GLOB_DAT;
#else
constexpr uint32_t kJumpSlot = R_AARCH64_JUMP_SLOT, kGlobal = R_AARCH64_GLOB_DAT;
#endif
constexpr const char* kFunction = "posix_memalign";
constexpr size_t kLarge = 1 << 19;

int allocate(void** block, size_t alignment, size_t size) {
  if (size < kLarge) return posix_memalign(block, alignment, size);
  *block = std::malloc(size);
  return *block ? 0 : ENOMEM;
}

// glibc's own allocator, of a version with the bug.
bool is_needed() {
  char* minor = nullptr;
  if (std::strtol(gnu_get_libc_version(), &minor, 10) != 2 || *minor != '.') return false;
  if (std::strtol(minor + 1, nullptr, 10) >= 38) return false;
  const char* const used[] = {kFunction, "malloc", "free"};
  for (const char* name : used) {
    Dl_info where;
    void* const found = dlsym(RTLD_DEFAULT, name);
    if (!found || !dladdr(found, &where) || !where.dli_fname || !std::strstr(where.dli_fname, "libc.so")) return false;
  }
  return true;
}

struct Library {
  const char* name = nullptr;
  uintptr_t base = 0;
  const ElfW(Dyn)* entries = nullptr;
  uintptr_t read_only = 0, read_only_end = 0;
  bool is_done = false;

  template <typename T>
  const T* table(int64_t tag) const {
    for (const ElfW(Dyn)* entry = entries; entry->d_tag != DT_NULL; ++entry)
      if (entry->d_tag == tag) {
        const uintptr_t at = entry->d_un.d_ptr;
        return reinterpret_cast<const T*>(at < base ? base + at : at);
      }
    return nullptr;
  }

  size_t size(int64_t tag) const {
    for (const ElfW(Dyn)* entry = entries; entry->d_tag != DT_NULL; ++entry)
      if (entry->d_tag == tag) return entry->d_un.d_val;
    return 0;
  }
};

bool write_slot(const Library& library, uintptr_t slot) {
  const bool is_protected = slot >= library.read_only && slot < library.read_only_end;
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)), start = slot & ~(page - 1);
  if (is_protected && mprotect(reinterpret_cast<void*>(start), page, PROT_READ | PROT_WRITE) != 0) return false;
  const auto to = reinterpret_cast<uintptr_t>(&allocate);
  __atomic_store_n(reinterpret_cast<uintptr_t*>(slot), to, __ATOMIC_RELEASE);
  if (is_protected) mprotect(reinterpret_cast<void*>(start), page, PROT_READ);
  return true;
}

bool redirect(const Library& library, const ElfW(Rela) * entries, size_t bytes) {
  const auto* const symbols = library.table<ElfW(Sym)>(DT_SYMTAB);
  const auto* const names = library.table<char>(DT_STRTAB);
  bool is_done = false;
  for (size_t i = 0; entries && symbols && names && i < bytes / sizeof *entries; ++i) {
    const auto type = static_cast<uint32_t>(ELF64_R_TYPE(entries[i].r_info));
    if (type != kJumpSlot && type != kGlobal) continue;
    if (std::strcmp(names + symbols[ELF64_R_SYM(entries[i].r_info)].st_name, kFunction) != 0) continue;
    is_done = write_slot(library, library.base + entries[i].r_offset) || is_done;
  }
  return is_done;
}

int visit(dl_phdr_info* info, size_t, void* result) {
  const char* const file = std::strrchr(info->dlpi_name, '/');
  auto& library = *static_cast<Library*>(result);
  if (std::strcmp(file ? file + 1 : info->dlpi_name, library.name) != 0) return 0;
  library.base = info->dlpi_addr;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& part = info->dlpi_phdr[i];
    if (part.p_type == PT_DYNAMIC) library.entries = reinterpret_cast<const ElfW(Dyn)*>(library.base + part.p_vaddr);
    if (part.p_type == PT_GNU_RELRO) {
      library.read_only = library.base + part.p_vaddr;
      library.read_only_end = library.read_only + part.p_memsz;
    }
  }
  if (!library.entries) return 1;
  const bool in_calls = redirect(library, library.table<ElfW(Rela)>(DT_JMPREL), library.size(DT_PLTRELSZ));
  const bool in_data = redirect(library, library.table<ElfW(Rela)>(DT_RELA), library.size(DT_RELASZ));
  library.is_done = in_calls || in_data;
  return 1;
}

}  // namespace

bool reuse_freed_blocks(const char* name) {
  if (!is_needed()) return false;
  Library library;
  library.name = name;
  dl_iterate_phdr(&visit, &library);
  return library.is_done;
}

}  // namespace synthward

#else

namespace synthward {
bool reuse_freed_blocks(const char*) { return false; }
}  // namespace synthward

#endif
