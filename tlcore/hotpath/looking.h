/* Looking at tensors: what a plain one is, and what is known of its dtype and shape. */
#ifndef TLCORE_LOOKING_H
#define TLCORE_LOOKING_H

#include "dlpack.h"
#include "native.h"

/* More dimensions than torch keeps inside a tensor's head go the long way. */
#define TLCORE_DIMENSIONS 5

typedef struct {
    dlpack_dtype dtype;
    int32_t ndim;
    int64_t shape[TLCORE_DIMENSIONS];
    int exact;        /* whether other dtypes look the same to DLPack, so that `torch_dtype` must be compared */
    Py_ssize_t nbytes;
    PyObject *torch_dtype;
    PyObject *spec;
} known_spec;

/* What has been said of tensors' dtypes and shapes: open addressing, a power of two of slots. */
typedef struct {
    known_spec *slots;
    size_t size, used;
} spec_table;

/* Whether tensors can be looked at in this process: `learn` has found out what marks a plain one. */
int tlcore_can_look(void);
/* Whether the object is exactly a torch.Tensor; and whether it is one at all. */
int tlcore_is_tensor(PyObject *object);
int tlcore_is_some_tensor(PyObject *object);
/* Fill in the view of a plain, strided CPU tensor with memory; 0 for any other, never an exception. */
int tlcore_look(PyObject *tensor, dlpack_tensor *view);
int tlcore_is_contiguous(const dlpack_tensor *view);

/* What is known of a tensor that was looked at; NULL where nothing is. */
const known_spec *tlcore_find(const spec_table *table, PyObject *tensor, const dlpack_tensor *view);
/* Remember something; -1 with an exception set. A table that is full, or a tensor that is not plain, is passed over. */
int tlcore_know(spec_table *table, PyObject *tensor, PyObject *spec, Py_ssize_t nbytes);
void tlcore_forget(spec_table *table);
int tlcore_traverse(const spec_table *table, visitproc visit, void *arg);

int tlcore_add_looking(PyObject *module);

#endif
