/* What stands in for a module's `forward`. */
#ifndef TLCORE_LISTENING_H
#define TLCORE_LISTENING_H

#include "again.h"

/* Whose calls are heard at the moment; 0 for nobody's. */
typedef struct {
    PyObject_HEAD
    unsigned long owner;
} hearing_object;

/* The sides of one call by their structures; the base of Python's calls. */
typedef struct {
    PyObject_HEAD
    PyObject *inputs, *outputs;
    last_structure given, returned;
} sides_object;

typedef struct {
    PyObject_HEAD
    PyObject *walker, *collector, *hearing, *own, *original, *replaced, *sites, *handles, *module, *given;
    Py_ssize_t count, elsewhere, running;
    char post, dead, covered;
} listening_object;

extern PyTypeObject *tlcore_sides_type;
extern PyObject *tlcore_forward_key;
/* hear(listener, args, kwargs): one call of what a `Listening` stands for. */
PyObject *tlcore_hear(PyObject *self, PyObject *const *given, Py_ssize_t count);
/* Whether the module's class gives it another function than it gave: others may exchange that for all modules at once. */
int tlcore_is_exchanged(const listening_object *mine);
int tlcore_add_hearing(PyObject *module);

#endif
