/* How the worker, inside of the emulation, speaks to the counting plugin, outside of it. */
#ifndef TVM_COMPRESS_COUNTING_H_
#define TVM_COMPRESS_COUNTING_H_

/* A system call that Linux does not have; its arguments are one of the commands and what stands beside it. */
enum {
  COUNTING_SYSCALL = 0xa72,
  COUNTING_CODE = 1,  /* first address, address after the last: the code that is counted from here on */
  COUNTING_DATA = 2,  /* first address, address after the last: the memory that is seen through the caches */
  COUNTING_BEGIN = 3, /* counts to 0, caches empty */
  COUNTING_WARM = 4,  /* counts to 0, caches as they are */
  COUNTING_END = 5    /* index of the file that the counts are written to */
};

#endif
