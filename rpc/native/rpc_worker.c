/* Serves one TVM RPC session on a board that has no Python: waits for one client, then runs TVM's own loop.
 *
 * usage: TVM_COMPRESS_RPC_KEY=KEY rpc_worker LISTENING_FD DIRECTORY
 *
 * LISTENING_FD is an inherited listening socket, DIRECTORY where uploaded files go, KEY what the client must say in
 * its greeting; it is in the environment because everybody on a machine can read the arguments. Only the C interface
 * of tvm-ffi is used, so no C++ compiler is needed.
 *
 * Functions for the client besides those of TVM's runtime:
 *   tvm_compress.base_address(file) -> int   where an uploaded library was loaded
 *   tvm_compress.count_begin()               set the counters of counting_plugin.c to 0 and empty its caches
 *   tvm_compress.count_warm()                set the counters to 0, but leave the caches as they are
 *   tvm_compress.count_end(index)            write the counters to PREFIX.index on the host
 * What is counted is the code of the library that was loaded last.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <link.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <tvm/ffi/c_api.h>
#include <unistd.h>

#include "counting.h"
#include "data_memory.h"

enum { RPC_MAGIC = 0xff271, RPC_MISMATCH = RPC_MAGIC + 2, MAX_KEY = 1024, MAX_PATH = 4096 };

static const char *directory;

static void fail(const char *what) {
  fprintf(stderr, "rpc_worker: %s: %s\n", what, strerror(errno));
  exit(EXIT_FAILURE);
}

static void fail_with_raised(const char *what) {
  TVMFFIObjectHandle error = NULL;
  TVMFFIErrorMoveFromRaised(&error);
  if (error != NULL) {
    const TVMFFIErrorCell *cell = (TVMFFIErrorCell *)((char *)error + sizeof(TVMFFIObject));
    fprintf(stderr, "rpc_worker: %s: %.*s\n", what, (int)cell->message.size, cell->message.data);
  } else {
    fprintf(stderr, "rpc_worker: %s failed\n", what);
  }
  exit(EXIT_FAILURE);
}

static int raise_error(const char *kind, const char *message) {
  TVMFFIErrorSetRaisedFromCStr(kind, message);
  return -1;
}

/* Join the directory and a file name given as an FFI string; the name may not leave the directory. */
static int path_of(const TVMFFIAny *name, char *path) {
  const char *data;
  size_t size;
  if (name->type_index == kTVMFFIRawStr) {
    data = name->v_c_str;
    size = strlen(data);
  } else if (name->type_index == kTVMFFISmallStr) {
    data = name->v_bytes;
    size = name->small_str_len;
  } else if (name->type_index == kTVMFFIStr) {
    const TVMFFIByteArray *bytes = (TVMFFIByteArray *)((char *)name->v_obj + sizeof(TVMFFIObject));
    data = bytes->data;
    size = bytes->size;
  } else {
    return raise_error("TypeError", "the name of a file must be a string");
  }
  if (memchr(data, '/', size) != NULL || memchr(data, '\0', size) != NULL) {
    return raise_error("ValueError", "the name of a file may hold no slash and no zero byte");
  }
  if (snprintf(path, MAX_PATH, "%s/%.*s", directory, (int)size, data) >= MAX_PATH) {
    return raise_error("ValueError", "the name of a file is too long");
  }
  return 0;
}

static TVMFFIObjectHandle global_function(const char *name) {
  TVMFFIByteArray bytes = {name, strlen(name)};
  TVMFFIObjectHandle function = NULL;
  if (TVMFFIFunctionGetGlobal(&bytes, &function) != 0 || function == NULL) {
    fprintf(stderr, "rpc_worker: TVM's runtime has no function %s\n", name);
    exit(EXIT_FAILURE);
  }
  return function;
}

static int workpath(void *self, const TVMFFIAny *args, int32_t count, TVMFFIAny *result) {
  char path[MAX_PATH];
  (void)self;
  if (count != 1) return raise_error("TypeError", "workpath takes one argument");
  if (path_of(args, path) != 0) return -1;
  TVMFFIByteArray bytes = {path, strlen(path)};
  return TVMFFIStringFromByteArray(&bytes, result);
}

struct search {
  const char *path;
  ElfW(Addr) address, code_start, code_end;
  int found;
};

static int match_library(struct dl_phdr_info *info, size_t size, void *data) {
  struct search *search = data;
  (void)size;
  if (strcmp(info->dlpi_name, search->path) != 0) return 0;
  search->address = info->dlpi_addr;
  search->found = 1;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr) *segment = &info->dlpi_phdr[i];
    if (segment->p_type != PT_LOAD || !(segment->p_flags & PF_X)) continue;
    search->code_start = info->dlpi_addr + segment->p_vaddr;
    search->code_end = search->code_start + segment->p_memsz;
  }
  return 1;
}

/* The system call does not exist: the emulator's plugin sees it before the kernel refuses it. */
static void tell_plugin(long command, long first, long second) {
  syscall(COUNTING_SYSCALL, command, first, second);
}

static int load_module(void *self, const TVMFFIAny *args, int32_t count, TVMFFIAny *result) {
  char path[MAX_PATH];
  TVMFFIAny argument = {0};
  (void)self;
  if (count != 1) return raise_error("TypeError", "load_module takes one argument");
  if (path_of(args, path) != 0) return -1;
  argument.type_index = kTVMFFIRawStr;
  argument.v_c_str = path;
  TVMFFIObjectHandle function = global_function("ffi.ModuleLoadFromFile");
  int code = TVMFFIFunctionCall(function, &argument, 1, result);
  TVMFFIObjectDecRef(function);
  struct search search = {.path = path};
  if (code == 0 && dl_iterate_phdr(match_library, &search) != 0) {
    tell_plugin(COUNTING_CODE, (long)search.code_start, (long)search.code_end);
  }
  return code;
}

static int base_address(void *self, const TVMFFIAny *args, int32_t count, TVMFFIAny *result) {
  char path[MAX_PATH];
  (void)self;
  if (count != 1) return raise_error("TypeError", "base_address takes one argument");
  if (path_of(args, path) != 0) return -1;
  struct search search = {.path = path};
  dl_iterate_phdr(match_library, &search);
  if (!search.found) return raise_error("ValueError", "the library is not loaded");
  result->type_index = kTVMFFIInt;
  result->v_int64 = (int64_t)search.address;
  return 0;
}

static int count_begin(void *self, const TVMFFIAny *args, int32_t count, TVMFFIAny *result) {
  (void)self, (void)args, (void)count, (void)result;
  announce_data_memory();
  tell_plugin(COUNTING_BEGIN, 0, 0);
  return 0;
}

static int count_warm(void *self, const TVMFFIAny *args, int32_t count, TVMFFIAny *result) {
  (void)self, (void)args, (void)count, (void)result;
  tell_plugin(COUNTING_WARM, 0, 0);
  return 0;
}

static int count_end(void *self, const TVMFFIAny *args, int32_t count, TVMFFIAny *result) {
  (void)self, (void)result;
  if (count != 1 || args[0].type_index != kTVMFFIInt) {
    return raise_error("TypeError", "count_end takes an integer");
  }
  tell_plugin(COUNTING_END, (long)args[0].v_int64, 0);
  return 0;
}

static void register_function(const char *name, TVMFFISafeCallType call) {
  TVMFFIByteArray bytes = {name, strlen(name)};
  TVMFFIObjectHandle function = NULL;
  if (TVMFFIFunctionCreate(NULL, call, NULL, &function) != 0 ||
      TVMFFIFunctionSetGlobal(&bytes, function, 1) != 0) {
    fail_with_raised(name);
  }
  TVMFFIObjectDecRef(function);
}

static void receive_all(int fd, void *buffer, size_t size) {
  for (size_t done = 0; done < size;) {
    ssize_t got = recv(fd, (char *)buffer + done, size - done, 0);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) fail("the client went away while greeting");
    done += (size_t)got;
  }
}

static void send_all(int fd, const void *buffer, size_t size) {
  for (size_t done = 0; done < size;) {
    ssize_t sent = send(fd, (const char *)buffer + done, size - done, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent <= 0) fail("the client went away while greeting");
    done += (size_t)sent;
  }
}

/* TVM's greeting: (magic, length, "client:KEY options") is answered by (magic, length, "server:"). */
static int greet(int listening, const char *key) {
  static const char answer[] = "server:";
  char expected[MAX_KEY + 1], said[MAX_KEY + 1];
  if (snprintf(expected, sizeof expected, "client:%s", key) >= (int)sizeof expected) fail("the key is too long");
  for (;;) {
    int fd = accept(listening, NULL, NULL);
    if (fd < 0 && errno == EINTR) continue;
    if (fd < 0) fail("accept");
    int32_t head[2];
    receive_all(fd, head, sizeof head);
    if (head[0] == RPC_MAGIC && head[1] >= 0 && head[1] <= MAX_KEY) {
      receive_all(fd, said, (size_t)head[1]);
      said[head[1]] = '\0';
      said[strcspn(said, " ")] = '\0';
      if (strcmp(said, expected) == 0) {
        head[1] = (int32_t)strlen(answer);
        send_all(fd, head, sizeof head);
        send_all(fd, answer, strlen(answer));
        return fd;
      }
      head[0] = RPC_MISMATCH;
      send_all(fd, head, sizeof head[0]);
    }
    close(fd);
  }
}

int main(int argc, char **argv) {
  const char *key = getenv("TVM_COMPRESS_RPC_KEY");
  if (argc != 3 || key == NULL) {
    fprintf(stderr, "usage: TVM_COMPRESS_RPC_KEY=KEY rpc_worker LISTENING_FD DIRECTORY\n");
    return EXIT_FAILURE;
  }
  int listening = atoi(argv[1]);
  directory = argv[2];
  register_function("tvm.rpc.server.workpath", workpath);
  register_function("tvm.rpc.server.load_module", load_module);
  register_function("tvm_compress.base_address", base_address);
  register_function("tvm_compress.count_begin", count_begin);
  register_function("tvm_compress.count_warm", count_warm);
  register_function("tvm_compress.count_end", count_end);
  TVMFFIAny fd = {0}, result = {0};
  fd.type_index = kTVMFFIInt;
  fd.v_int64 = greet(listening, key);
  close(listening);
  if (TVMFFIFunctionCall(global_function("rpc.ServerLoop"), &fd, 1, &result) != 0) fail_with_raised("ServerLoop");
  return EXIT_SUCCESS;
}
