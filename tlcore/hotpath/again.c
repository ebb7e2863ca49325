/* A structure that is what it was at the call before: taken without making its sketch again.
 *
 * Nothing is noted and no code of others runs until the whole value is known to be the same; then it is what
 * `tlcore_flatten` would have found. Whatever differs, or is more than plain, is left to that.
 */
#include "again.h"

#include <string.h>

#define MOST_LEAVES 16
#define DEEPEST 8
#define MOST_SKETCHES 4096

typedef struct {
    PyObject *object; /* held */
    PyObject *spec;   /* held; NULL for a scalar */
    PyObject *memory; /* held: where it has been copied to before; NULL where it is to be copied */
    Py_ssize_t begin;
    tlcore_source source;
} leaf;

typedef struct {
    walker_object *walker;
    Py_ssize_t end; /* of the memory that the leaves will fill */
    int count;
    leaf all[MOST_LEAVES];
} leaves;

static int same(leaves *found, PyObject *value, PyObject *sketch, int depth);

static int same_tensor(leaves *found, PyObject *value)
{
    dlpack_tensor view;
    memory_object *memory = (memory_object *)found->walker->memory;
    if (found->count == MOST_LEAVES || memory == NULL || !tlcore_can_look() || !tlcore_is_tensor(value) ||
        !tlcore_look(value, &view))
        return 0;
    const known_spec *known = tlcore_find(&found->walker->known, value, &view);
    leaf *one = &found->all[found->count];
    if (known == NULL || !tlcore_find_source(&view, known->nbytes, &one->source))
        return 0;
    const taken_copy *taken = tlcore_find_taken(&found->walker->taken, &one->source);
    if (taken == NULL && (found->end < 0 || memory->size < found->end || memory->size - found->end < known->nbytes))
        return 0;
    one->object = Py_NewRef(value);
    one->spec = Py_NewRef(known->spec);
    one->memory = taken == NULL ? NULL : Py_NewRef(taken->memory);
    one->begin = taken == NULL ? found->end : taken->begin;
    found->count++;
    if (taken == NULL)
        found->end += (known->nbytes + 63) & ~(Py_ssize_t)63;
    return 1;
}

static int same_scalar(leaves *found, PyObject *value)
{
    if (found->count == MOST_LEAVES || !tlcore_is_scalar(value))
        return 0;
    leaf *one = &found->all[found->count++];
    one->object = Py_NewRef(value);
    one->spec = one->memory = NULL;
    return 1;
}

static int same_items(leaves *found, PyObject *value, PyObject *items, int depth)
{
    int is_tuple = PyTuple_CheckExact(value);
    Py_ssize_t count = PyTuple_Size(items);
    if ((is_tuple ? PyTuple_Size(value) : PyList_Size(value)) != count)
        return 0;
    for (Py_ssize_t i = 0; i < count; i++)
        if (!same(found, is_tuple ? PyTuple_GetItem(value, i) : PyList_GetItem(value, i), PyTuple_GetItem(items, i),
                  depth))
            return 0;
    return 1;
}

static int same_dict(leaves *found, PyObject *value, PyObject *sketch, int depth)
{
    PyObject *keys = PyTuple_GetItem(sketch, 1), *items = PyTuple_GetItem(sketch, 2), *key, *item;
    Py_ssize_t count = PyTuple_Size(keys), place = 0;
    if (PyDict_Size(value) != count)
        return 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *expected = PyTuple_GetItem(keys, i);
        if (!PyDict_Next(value, &place, &key, &item) || !PyUnicode_CheckExact(key))
            return 0;
        if (key != expected && !(PyUnicode_CheckExact(expected) && PyUnicode_Compare(key, expected) == 0))
            return 0;
        if (!same(found, item, PyTuple_GetItem(items, i), depth))
            return 0;
    }
    return 1;
}

static int same(leaves *found, PyObject *value, PyObject *sketch, int depth)
{
    if (sketch == tlcore_tensor_word)
        return same_tensor(found, value);
    if (sketch == tlcore_scalar_word)
        return same_scalar(found, value);
    if (sketch == tlcore_none_word)
        return value == Py_None;
    if (depth == DEEPEST || !PyTuple_CheckExact(sketch))
        return 0;
    PyObject *word = PyTuple_Size(sketch) > 0 ? PyTuple_GetItem(sketch, 0) : NULL;
    if (PyTuple_Size(sketch) == 2 && ((word == tlcore_tuple_word && PyTuple_CheckExact(value)) ||
                                      (word == tlcore_list_word && PyList_CheckExact(value))))
        return same_items(found, value, PyTuple_GetItem(sketch, 1), depth + 1);
    if (PyTuple_Size(sketch) == 3 && word == tlcore_dict_word && PyDict_CheckExact(value))
        return same_dict(found, value, sketch, depth + 1);
    return 0;
}

/* Notes everything, then copies; -1 with an exception set. */
static int take(leaves *found, PyObject *side)
{
    walker_object *walker = found->walker;
    memory_object *memory = (memory_object *)walker->memory;
    if (memory != NULL)
        memory->bytes = found->end;
    PyObject *held = memory == NULL ? NULL : Py_NewRef((PyObject *)memory);
    uint64_t batch = walker->taken.batch;
    int failed = 0;
    for (int i = 0; i < found->count && !failed; i++) {
        const leaf *one = &found->all[i];
        failed = one->spec == NULL ? PyList_Append(walker->scalars, one->object)
                                   : tlcore_note(walker, one->spec, one->memory ? one->memory : held, one->begin);
    }
    if (!failed)
        failed = PyList_Append(walker->sides, side);
    for (int i = 0; i < found->count && !failed; i++) {
        const leaf *one = &found->all[i];
        if (one->spec == NULL || one->memory != NULL || !one->source.bytes)
            continue;
        tlcore_copy_source((char *)memory->address + one->begin, &one->source);
        tlcore_note_taken(&walker->taken, &one->source, held, one->begin, batch);
    }
    Py_XDECREF(held);
    return failed ? -1 : 0;
}

int tlcore_take_again(walker_object *walker, const last_structure *last, PyObject *value, PyObject *kwargs)
{
    /* Not cleared: most of it is never used. */
    leaves found;
    found.walker = walker;
    found.count = 0;
    if (last->side == NULL)
        return 0;
    found.end = walker->memory == NULL ? -1 : ((memory_object *)walker->memory)->bytes;
    int taken = same(&found, value, last->sketch, 0);
    if (taken && kwargs != NULL)
        taken = last->keywords == NULL ? PyDict_Size(kwargs) == 0 : same(&found, kwargs, last->keywords, 0);
    if (taken) {
        PyObject *side = Py_NewRef(last->side);
        if (take(&found, side))
            taken = -1;
        Py_DECREF(side);
    }
    for (int i = 0; i < found.count; i++) {
        Py_DECREF(found.all[i].object);
        Py_XDECREF(found.all[i].spec);
        Py_XDECREF(found.all[i].memory);
    }
    return taken;
}

/* One sketch for all that are equal, so that comparing them stays in the processor's cache. */
static PyObject *shared(walker_object *walker, PyObject *sketch)
{
    if (sketch == NULL)
        return NULL;
    if (walker->sketches == NULL && (walker->sketches = PyDict_New()) == NULL)
        return NULL;
    PyObject *known = PyDict_GetItemWithError(walker->sketches, sketch);
    if (known != NULL)
        return known;
    if (!PyErr_Occurred() && PyDict_Size(walker->sketches) < MOST_SKETCHES)
        PyDict_SetItem(walker->sketches, sketch, sketch);
    return sketch;
}

void tlcore_remember(walker_object *walker, last_structure *last, PyObject *sketch, PyObject *keywords, PyObject *side)
{
    tlcore_set(&last->sketch, shared(walker, sketch));
    tlcore_set(&last->keywords, shared(walker, keywords));
    tlcore_set(&last->side, side);
    /* What could not be remembered is only slower next time. */
    PyErr_Clear();
    if (last->sketch == NULL)
        Py_CLEAR(last->side);
}

int tlcore_visit_last(const last_structure *last, visitproc visit, void *arg)
{
    Py_VISIT(last->sketch);
    Py_VISIT(last->keywords);
    Py_VISIT(last->side);
    return 0;
}

void tlcore_forget_last(last_structure *last)
{
    Py_CLEAR(last->side);
    Py_CLEAR(last->sketch);
    Py_CLEAR(last->keywords);
}
