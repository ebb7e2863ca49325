/* Where a plain tensor's bytes lie, and copying them one after the other. */
#ifndef TLCORE_STRIDES_H
#define TLCORE_STRIDES_H

#include "looking.h"

/* A tensor's bytes: `runs` of `run` bytes each, one run where it is contiguous. */
typedef struct {
    const char *data;
    Py_ssize_t bytes, run;
    int outer; /* dimensions around the runs, the outermost first; strides in bytes */
    Py_ssize_t counts[TLCORE_DIMENSIONS], strides[TLCORE_DIMENSIONS];
} tlcore_source;

/* Find out how the `bytes` bytes of a view lie; 0 where torch copies them faster. */
int tlcore_find_source(const dlpack_tensor *view, Py_ssize_t bytes, tlcore_source *source);

/* Copy, without the interpreter's lock where that takes long. The tensor must be held. */
void tlcore_copy_source(char *target, const tlcore_source *source);

#endif
