/* The data caches of a Cortex-A72 as a Raspberry Pi 4 has it: what is in them, and nothing of time. */
#ifndef TVM_COMPRESS_CACHES_H_
#define TVM_COMPRESS_CACHES_H_

#include <stdint.h>
#include <string.h>

enum {
  LINE_BITS = 6,                  /* 64 bytes */
  L1_SETS = 256, L1_WAYS = 2,     /* 32 KB */
  L2_SETS = 1024, L2_WAYS = 16    /* 1 MB */
};

/* Lines by set, the one used last in front; 0 is none. */
struct caches {
  uint32_t l1[L1_SETS][L1_WAYS], l2[L2_SETS][L2_WAYS];
};

struct misses {
  uint64_t l1, l2;
};

/* Move a line to the front of its set; gives whether it was there. The least recently used one makes room. */
static inline int use(uint32_t *set, int ways, uint32_t line) {
  int way = 0;
  while (way < ways - 1 && set[way] != line) ++way;
  int found = set[way] == line;
  memmove(set + 1, set, (size_t)way * sizeof *set);
  set[0] = line;
  return found;
}

/* Read or write a line: a store brings its line in as a load does. */
static inline void touch(struct caches *caches, uint32_t line, struct misses *misses) {
  uint32_t *set = caches->l1[line % L1_SETS];
  if (set[0] == line || use(set, L1_WAYS, line)) return;
  ++misses->l1;
  if (!use(caches->l2[line % L2_SETS], L2_WAYS, line)) ++misses->l2;
}

#endif
