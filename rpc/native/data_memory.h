/* The memory of tensors; see data_memory.c. */
#ifndef TVM_COMPRESS_DATA_MEMORY_H_
#define TVM_COMPRESS_DATA_MEMORY_H_

/* Tell the counting plugin where the memory is. */
void announce_data_memory(void);

#endif
