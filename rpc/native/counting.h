/* How the worker, inside of the emulation, speaks to the counting plugin, outside of it. */
#ifndef TVM_COMPRESS_COUNTING_H_
#define TVM_COMPRESS_COUNTING_H_

/* A system call that Linux does not have; its arguments are one of the commands and a number. */
enum { COUNTING_SYSCALL = 0xa72, COUNTING_BEGIN = 1, COUNTING_END = 2 };

#endif
