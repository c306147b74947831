/* A QEMU plugin that counts how often each translated block of a library runs, and what misses the data caches.
 *
 * usage: -plugin counting_plugin.so,out=PREFIX
 *
 * The emulated program says by the commands of counting.h which code counts and which memory is seen through the
 * caches; all else is as if it were free. COUNTING_END n writes PREFIX.n: for each block that ran a line
 * "block ADDRESS INSTRUCTIONS COUNT", for each instruction that missed "misses ADDRESS L1 L2" (addresses are
 * hexadecimal), then "END".
 *
 * Addresses of the caches are not those of the program: its pages are numbered in the order in which the counted
 * code first touches them after COUNTING_BEGIN, so that it does not show where they lie.
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

#include "caches.h"
#include "counting.h"

#ifndef PLUGIN_VERSION
#define PLUGIN_VERSION 1
#endif

typedef uint64_t plugin_id;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
typedef void (*translate_callback)(plugin_id, struct qemu_plugin_tb *);
typedef void (*syscall_callback)(plugin_id, unsigned, int64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t,
                                 uint64_t, uint64_t, uint64_t);
typedef void (*execute_callback)(unsigned, void *);
typedef void (*memory_callback)(unsigned, uint32_t, uint64_t, void *);

void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, translate_callback);
void qemu_plugin_register_vcpu_syscall_cb(plugin_id, syscall_callback);
void qemu_plugin_register_vcpu_tb_exec_cb(struct qemu_plugin_tb *, execute_callback, int flags, void *data);
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, int operation, void *counter, uint64_t step);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
uint64_t qemu_plugin_insn_vaddr(const struct qemu_plugin_insn *);
void qemu_plugin_register_vcpu_mem_cb(struct qemu_plugin_insn *, memory_callback, int flags, int loads_or_stores,
                                      void *data);
unsigned qemu_plugin_mem_size_shift(uint32_t);

__attribute__((visibility("default"))) int qemu_plugin_version = PLUGIN_VERSION;

/* A block is known by its address and length: QEMU translates it anew whenever it likes. */
struct block {
  uint64_t address, instructions, count;
  struct block *next;
};

enum { BUCKETS = 1 << 16, MAX_PATH = 4096, PAGE_BITS = 12, LOADS_AND_STORES = 3, MOST_BYTES = 16 };
static struct block *buckets[BUCKETS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char prefix[MAX_PATH];

/* The code that is counted, and by instruction what it missed. */
static uint64_t code_start, code_end;
static struct misses *misses;

/* The memory that is seen through the caches; by page its number since COUNTING_BEGIN, 0 for none yet. */
static uint64_t data_start, data_size;
static uint32_t *page_numbers, pages;
static struct caches caches;

static void *allocate(size_t count, size_t size) {
  void *memory = calloc(count, size);
  if (memory == NULL) {
    fprintf(stderr, "counting_plugin: out of memory\n");
    abort();
  }
  return memory;
}

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
  struct block *block = allocate(1, sizeof *block);
  block->address = address;
  block->instructions = instructions;
  block->next = *bucket;
  *bucket = block;
  return block;
}

static void touch_byte(uint64_t offset, struct misses *missed) {
  uint32_t *number = &page_numbers[offset >> PAGE_BITS];
  if (*number == 0) *number = ++pages;
  touch(&caches, *number << (PAGE_BITS - LINE_BITS) | (offset >> LINE_BITS & ((1 << (PAGE_BITS - LINE_BITS)) - 1)),
        missed);
}

static void access_memory(unsigned cpu, uint32_t info, uint64_t address, void *missed) {
  (void)cpu;
  uint64_t offset = address - data_start;
  if (offset >= data_size) return;
  touch_byte(offset, missed);
  uint64_t in_line = offset & ((1 << LINE_BITS) - 1);
  if (in_line <= (1 << LINE_BITS) - MOST_BYTES) return;
  uint64_t size = UINT64_C(1) << qemu_plugin_mem_size_shift(info);
  if (in_line + size > 1 << LINE_BITS && offset + size <= data_size) touch_byte(offset + size - 1, missed);
}

static void translate(plugin_id id, struct qemu_plugin_tb *tb) {
  (void)id;
  uint64_t address = qemu_plugin_tb_vaddr(tb);
  size_t instructions = qemu_plugin_tb_n_insns(tb);
  pthread_mutex_lock(&lock);
  if (address >= code_start && address < code_end) {
    struct block *block = find_block(address, instructions);
#if PLUGIN_VERSION >= 2
    qemu_plugin_register_vcpu_tb_exec_cb(tb, execute, 0, &block->count);
#else
    qemu_plugin_register_vcpu_tb_exec_inline(tb, 0, &block->count, 1);
#endif
    for (size_t i = 0; i < instructions; ++i) {
      struct qemu_plugin_insn *instruction = qemu_plugin_tb_get_insn(tb, i);
      struct misses *missed = &misses[(qemu_plugin_insn_vaddr(instruction) - code_start) / 4];
      qemu_plugin_register_vcpu_mem_cb(instruction, access_memory, 0, LOADS_AND_STORES, missed);
    }
  }
  pthread_mutex_unlock(&lock);
}

/* What is counted from here on. The former array stays: blocks that are translated point into it. */
static void set_code(uint64_t start, uint64_t end) {
  misses = allocate((end - start) / 4 + 1, sizeof *misses);
  code_start = start;
  code_end = end;
}

static void set_data(uint64_t start, uint64_t end) {
  free(page_numbers);
  data_start = start;
  data_size = end - start;
  page_numbers = allocate((data_size >> PAGE_BITS) + 1, sizeof *page_numbers);
}

static void reset_counts(void) {
  for (size_t i = 0; i < BUCKETS; ++i) {
    for (struct block *block = buckets[i]; block != NULL; block = block->next) block->count = 0;
  }
  if (misses != NULL) memset(misses, 0, (code_end - code_start) / 4 * sizeof *misses);
}

static void empty_caches(void) {
  memset(&caches, 0, sizeof caches);
  pages = 0;
  if (page_numbers != NULL) memset(page_numbers, 0, (data_size >> PAGE_BITS) * sizeof *page_numbers);
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
      fprintf(file, "block %" PRIx64 " %" PRIu64 " %" PRIu64 "\n", block->address, block->instructions, block->count);
    }
  }
  for (uint64_t address = code_start; address < code_end; address += 4) {
    const struct misses *missed = &misses[(address - code_start) / 4];
    if (missed->l1 == 0) continue;
    fprintf(file, "misses %" PRIx64 " %" PRIu64 " %" PRIu64 "\n", address, missed->l1, missed->l2);
  }
  fputs("END\n", file);
  if (fclose(file) != 0) fprintf(stderr, "counting_plugin: cannot write %s\n", path);
}

static void system_call(plugin_id id, unsigned cpu, int64_t number, uint64_t command, uint64_t first, uint64_t second,
                        uint64_t a4, uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8) {
  (void)id, (void)cpu, (void)a4, (void)a5, (void)a6, (void)a7, (void)a8;
  if (number != COUNTING_SYSCALL) return;
  pthread_mutex_lock(&lock);
  if (command == COUNTING_CODE) set_code(first, second);
  if (command == COUNTING_DATA) set_data(first, second);
  if (command == COUNTING_BEGIN) empty_caches();
  if (command == COUNTING_BEGIN || command == COUNTING_WARM) reset_counts();
  if (command == COUNTING_END) end(first);
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
