/* Walking a call's arguments and results. */
#ifndef TLCORE_PYTREE_H
#define TLCORE_PYTREE_H

#include "taken.h"

#define TLCORE_DEEPEST 64

/* Takes the leaves of structures: tensors into memory and lists, the rest by calling Python. */
typedef struct {
    PyObject_HEAD
    PyObject *tensor; /* tensor(value): the long way for one tensor */
    PyObject *other;  /* other(value, seen) -> sketch: the long way for a value */
    PyObject *memory; /* being filled; NULL until there is one */
    PyObject *sides, *specs, *memories, *offsets, *scalars; /* lists of the batch */
    PyObject *full;  /* list of full chunks: while there are some, the collector is called after each side */
    PyObject *sketches; /* by themselves, so that equal ones are the same object */
    char leaving;    /* whether results are taken, not arguments */
    spec_table known;
    taken_copies taken;
} walker_object;

/* The sketch of a value whose leaves are taken; NULL with an exception set. `seen` are the containers around it. */
typedef struct {
    const PyObject *inside[TLCORE_DEEPEST];
    int depth;
} containers;

PyObject *tlcore_flatten(walker_object *walker, PyObject *value, containers *seen);
/* The structure that a side of a call had last: its sketch, that of keywords where there are some, its side. */
typedef struct {
    PyObject *sketch, *keywords, *side;
} last_structure;

/* Take a call's arguments, or its result, and add their side: None; where none is known, what Python is to add.
 * `last` may be NULL. */
PyObject *tlcore_take_arguments(walker_object *walker, last_structure *last, PyObject *sides, PyObject *args,
                                PyObject *kwargs);
PyObject *tlcore_take_result(walker_object *walker, last_structure *last, PyObject *sides, PyObject *value);

/* The words of sketches. */
extern PyObject *tlcore_tensor_word, *tlcore_scalar_word, *tlcore_none_word;
extern PyObject *tlcore_tuple_word, *tlcore_list_word, *tlcore_dict_word;
int tlcore_make_words(void);
int tlcore_is_scalar(PyObject *value);
/* Note a tensor that was taken; -1 with an exception set. */
int tlcore_note(walker_object *walker, PyObject *spec, PyObject *memory, Py_ssize_t begin);
/* Whether the object is a walker with lists to fill. */
int tlcore_is_walker(PyObject *object);
/* Whether the object is a `memory_object`. */
int tlcore_is_memory(PyObject *object);
/* Put a new reference where another was; always 0. */
int tlcore_set(PyObject **place, PyObject *value);

#endif
