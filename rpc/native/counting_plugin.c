/* A QEMU plugin that counts how often each translated block of an emulated program runs.
 *
 * usage: -plugin counting_plugin.so,out=PREFIX
 *
 * Between COUNTING_BEGIN and COUNTING_END (see counting.h) the counts gather; COUNTING_END n writes PREFIX.n: a
 * line "ADDRESS INSTRUCTIONS COUNT" for each block that ran (hexadecimal, decimal, decimal), then "END".
 *
 * QEMU's interface is declared here by hand, so that neither its header nor glib is needed. PLUGIN_VERSION is 1 for
 * QEMU 4.2 to 8, 2 from QEMU 9 on, which lacks the inline counter of version 1.
 */
#include <inttypes.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "counting.h"

#ifndef PLUGIN_VERSION
#define PLUGIN_VERSION 1
#endif

typedef uint64_t plugin_id;
struct qemu_plugin_tb;
typedef void (*translate_callback)(plugin_id, struct qemu_plugin_tb *);
typedef void (*syscall_callback)(plugin_id, unsigned, int64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                                 uint64_t, uint64_t, uint64_t);
typedef void (*execute_callback)(unsigned, void *);

void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, translate_callback);
void qemu_plugin_register_vcpu_syscall_cb(plugin_id, syscall_callback);
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *, execute_callback, int flags, void *data);
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int operation, void *counter, uint64_t step);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);

__attribute__((visibility("default"))) int qemu_plugin_version = PLUGIN_VERSION;

/* A block is known by its address and length: QEMU translates it anew whenever it likes. */
struct block {
  uint64_t address, instructions, count;
  struct block *next;
};

enum { BUCKETS = 1 << 16, MAX_PATH = 4096 };
static struct block *buckets[BUCKETS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char prefix[MAX_PATH];

#if PLUGIN_VERSION >= 2
static void execute(unsigned cpu, void *data) {
  (void)cpu;
  ++*(uint64_t *)data;
}
#endif

static struct block *find_block(uint64_t address, uint64_t instructions) {
  struct block **bucket = &buckets[(address >> 2) % BUCKETS];
  for (struct block *block = *bucket; block != NULL; block = block->next) {
    if (block->address == address && block->instructions == instructions) return block;
  }
  struct block *block = calloc(1, sizeof *block);
  if (block == NULL) {
    fprintf(stderr, "counting_plugin: out of memory\n");
    abort();
  }
  block->address = address;
  block->instructions = instructions;
  block->next = *bucket;
  *bucket = block;
  return block;
}

static void translate(plugin_id id, struct qemu_plugin_tb *tb) {
  (void)id;
  pthread_mutex_lock(&lock);
  struct block *block = find_block(qemu_plugin_tb_vaddr(tb), qemu_plugin_tb_n_insns(tb));
  pthread_mutex_unlock(&lock);
#if PLUGIN_VERSION >= 2
  qemu_plugin_register_vcpu_tb_exec_cb(tb, execute, 0, &block->count);
#else
  qemu_plugin_register_vcpu_tb_exec_inline(tb, 0, &block->count, 1);
#endif
}

static void begin(void) {
  for (size_t i = 0; i < BUCKETS; ++i) {
    for (struct block *block = buckets[i]; block != NULL; block = block->next) block->count = 0;
  }
}

static void end(uint64_t index) {
  char path[MAX_PATH + 32];
  snprintf(path, sizeof path, "%s.%" PRIu64, prefix, index);
  FILE *file = fopen(path, "w");
  if (file == NULL) {
    fprintf(stderr, "counting_plugin: cannot write %s\n", path);
    return;
  }
  for (size_t i = 0; i < BUCKETS; ++i) {
    for (const struct block *block = buckets[i]; block != NULL; block = block->next) {
      if (block->count == 0) continue;
      fprintf(file, "%" PRIx64 " %" PRIu64 " %" PRIu64 "\n", block->address, block->instructions, block->count);
    }
  }
  fputs("END\n", file);
  if (fclose(file) != 0) fprintf(stderr, "counting_plugin: cannot write %s\n", path);
}

static void system_call(plugin_id id, unsigned cpu, int64_t number, uint64_t command, uint64_t argument, uint64_t a3,
                        uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8) {
  (void)id, (void)cpu, (void)a3, (void)a4, (void)a5, (void)a6, (void)a7, (void)a8;
  if (number != COUNTING_SYSCALL) return;
  pthread_mutex_lock(&lock);
  if (command == COUNTING_BEGIN) begin();
  if (command == COUNTING_END) end(argument);
  pthread_mutex_unlock(&lock);
}

__attribute__((visibility("default"))) int qemu_plugin_install(plugin_id id, const void *info, int argc, char **argv) {
  (void)info;
  for (int i = 0; i < argc; ++i) {
    if (strncmp(argv[i], "out=", 4) == 0) snprintf(prefix, sizeof prefix, "%s", argv[i] + 4);
  }
  if (prefix[0] == '\0') {
    fprintf(stderr, "counting_plugin: out=PREFIX is missing\n");
    return -1;
  }
  qemu_plugin_register_vcpu_tb_trans_cb(id, translate);
  qemu_plugin_register_vcpu_syscall_cb(id, system_call);
  return 0;
}
