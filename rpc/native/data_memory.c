/* The memory of tensors, apart from all other: TVM takes it by posix_memalign, which this file replaces.
 *
 * Each block has whole pages of one region. So the counting plugin can tell tensors from the stack and from the
 * runtime's own objects, whose places vary with the environment; and which blocks lie where depends on nothing but
 * the requests so far: the first gap that is large enough is taken, from the region's start.
 */
#define _GNU_SOURCE
#include "data_memory.h"

#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "counting.h"

enum { PAGE = 4096, PAGES = 1 << 20 }; /* 4 GB; what is not used costs nothing */

/* By its first page: length of a block or of a gap, in pages; 0 from the end of the last block on. */
static struct {
  uint32_t pages : 31, used : 1;
} blocks[PAGES];
static char *region;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* GNU libc's own, under the name that is not replaced. */
void __libc_free(void *);

static int map_region(void) {
  if (region != NULL) return 1;
  void *memory =
      mmap(NULL, (size_t)PAGE * PAGES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return 0;
  region = memory;
  return 1;
}

/* First page of a gap of that many pages, or PAGES; gaps that touch become one on the way. */
static uint32_t find_gap(uint32_t wanted) {
  uint32_t page = 0;
  while (page < PAGES && blocks[page].pages != 0) {
    uint32_t length = blocks[page].pages;
    if (!blocks[page].used) {
      while (page + length < PAGES && blocks[page + length].pages != 0 && !blocks[page + length].used) {
        length += blocks[page + length].pages;
      }
      if (length >= wanted) {
        if (length > wanted) blocks[page + wanted].pages = length - wanted, blocks[page + wanted].used = 0;
        return page;
      }
      blocks[page].pages = length;
    }
    page += length;
  }
  return wanted <= PAGES - page ? page : PAGES;
}

int posix_memalign(void **memory, size_t alignment, size_t size) {
  if (alignment < sizeof(void *) || (alignment & (alignment - 1)) != 0) return EINVAL;
  if (alignment > PAGE || size > (size_t)PAGE * PAGES) return ENOMEM;
  uint32_t wanted = size == 0 ? 1 : (uint32_t)((size + PAGE - 1) / PAGE);
  pthread_mutex_lock(&lock);
  uint32_t page = map_region() ? find_gap(wanted) : PAGES;
  if (page < PAGES) {
    blocks[page].pages = wanted;
    blocks[page].used = 1;
    *memory = region + (size_t)PAGE * page;
  }
  pthread_mutex_unlock(&lock);
  return page < PAGES ? 0 : ENOMEM;
}

void free(void *memory) {
  size_t offset = (size_t)((uintptr_t)memory - (uintptr_t)region);
  if (memory == NULL || region == NULL || offset >= (size_t)PAGE * PAGES) {
    __libc_free(memory);
    return;
  }
  pthread_mutex_lock(&lock);
  if (offset % PAGE != 0 || !blocks[offset / PAGE].used) abort();
  blocks[offset / PAGE].used = 0;
  pthread_mutex_unlock(&lock);
}

void announce_data_memory(void) {
  pthread_mutex_lock(&lock);
  if (map_region()) syscall(COUNTING_SYSCALL, COUNTING_DATA, region, region + (size_t)PAGE * PAGES);
  pthread_mutex_unlock(&lock);
}
