#include "parallel.h"

#include <memory>

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>

#include <string>
#endif

namespace stepfuse {

Range* ranges_of(int threads) {
  thread_local std::unique_ptr<Range[]> parts;
  thread_local int count = 0;
  if (count < threads) {
    parts = std::make_unique<Range[]>(threads);
    count = threads;
  }
  return parts.get();
}

ThreadPool& thread_pool() {
  static ThreadPool pool;
  return pool;
}

#if defined(__linux__)

namespace {

// A dl_iterate_phdr callback: copies the path of an OpenMP runtime and stops at the first.
int is_openmp_runtime(dl_phdr_info* info, size_t, void* found) {
  const std::string path = info->dlpi_name;
  const std::string file = path.substr(path.rfind('/') + 1);
  for (const char* name : {"libgomp", "libiomp5", "libomp"})
    if (file.rfind(name, 0) == 0) {
      *static_cast<std::string*>(found) = path;
      return 1;
    }
  return 0;
}

template <class Function>
void resolve(void* library, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(library, name));
}

}  // namespace

bool find_thread_pool() {
  std::string path;
  dl_iterate_phdr(is_openmp_runtime, &path);
  void* library = path.empty() ? nullptr : dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return false;
  ThreadPool& pool = thread_pool();
  decltype(pool.parallel) parallel = nullptr;
  resolve(library, "GOMP_parallel", parallel);
  resolve(library, "omp_get_thread_num", pool.rank);
  if (path.find("libgomp") != std::string::npos) resolve(library, "omp_get_num_procs", pool.cores);
  if (pool.rank != nullptr) pool.parallel = parallel;
  return pool.parallel != nullptr;
}

#else

bool find_thread_pool() { return false; }

#endif

}  // namespace stepfuse
