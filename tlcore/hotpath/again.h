/* Taking a structure that is what it was before. */
#ifndef TLCORE_AGAIN_H
#define TLCORE_AGAIN_H

#include "pytree.h"

/* Take a value (and the keywords of a call) that is as the last one was, and add its side: 1. 0, with nothing done,
 * where it is not or cannot be told; -1 with an exception set. */
int tlcore_take_again(walker_object *walker, const last_structure *last, PyObject *value, PyObject *kwargs);
void tlcore_remember(walker_object *walker, last_structure *last, PyObject *sketch, PyObject *keywords, PyObject *side);
int tlcore_visit_last(const last_structure *last, visitproc visit, void *arg);
void tlcore_forget_last(last_structure *last);

#endif
