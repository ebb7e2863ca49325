/* Where the tensors of a batch were copied to. */
#ifndef TLCORE_TAKEN_H
#define TLCORE_TAKEN_H

#include "strides.h"

/* Memory that is filled from the front; the base of Python's chunks. */
typedef struct {
    PyObject_HEAD
    Py_ssize_t address, size, bytes;
} memory_object;

/* A power of two; a later tensor takes an earlier one's slot. */
#define TLCORE_TAKEN_SLOTS 1024

/* One copy: of these bytes, in this memory (borrowed: the batch holds it) from `begin` on, in batch number `batch`. */
typedef struct {
    const char *data;
    Py_ssize_t bytes, begin;
    PyObject *memory;
    uint64_t batch;
} taken_copy;

typedef struct {
    uint64_t batch;
    taken_copy slots[TLCORE_TAKEN_SLOTS];
} taken_copies;

/* Forget all: another batch begins. */
void tlcore_forget_taken(taken_copies *all);

/* A copy of this batch that has the same bytes as what lies there now; NULL where none is known. */
const taken_copy *tlcore_find_taken(const taken_copies *all, const tlcore_source *source);

/* Remember a copy that was made for batch number `batch`. */
void tlcore_note_taken(taken_copies *all, const tlcore_source *source, PyObject *memory, Py_ssize_t begin,
                       uint64_t batch);

#endif
