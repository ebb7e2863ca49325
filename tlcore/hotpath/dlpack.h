/* The part of DLPack's C exchange interface (version 1.x) that is used here, written from its specification. */
#ifndef TLCORE_DLPACK_H
#define TLCORE_DLPACK_H

#include <stdint.h>

#define DLPACK_MAJOR 1
#define DLPACK_CPU 1
#define DLPACK_INT 0
#define DLPACK_UINT 1

typedef struct {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
} dlpack_dtype;

typedef struct {
    void *data;
    int32_t device_type, device_id;
    int32_t ndim;
    dlpack_dtype dtype;
    int64_t *shape;
    int64_t *strides; /* in elements */
    uint64_t byte_offset;
} dlpack_tensor;

/* Fills in a view that is good until the tensor is touched again; -1 with an exception set. */
typedef int (*dlpack_look)(void *object, dlpack_tensor *view);

typedef struct {
    uint32_t major, minor;
    void *previous;
    void *allocate, *export_owned, *import_owned;
    dlpack_look look; /* may be NULL */
    void *current_stream;
} dlpack_exchange;

#endif
