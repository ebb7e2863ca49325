/* Walking structures: the common case of plain containers, scalars and CPU tensors.
 *
 * The sketch of a value is the one that `flatten` in Python makes, and the leaves are taken in the same order.
 * Whatever is not common is handed to Python, one value at a time, so that Python says what it means.
 */
#include "pytree.h"

#include <string.h>

PyObject *tlcore_tensor_word, *tlcore_scalar_word, *tlcore_none_word;
PyObject *tlcore_tuple_word, *tlcore_list_word, *tlcore_dict_word;
static PyObject *no_items;

/* --- one tensor --- */

static int append_number(PyObject *list, Py_ssize_t number)
{
    PyObject *item = PyLong_FromSsize_t(number);
    int failed = item == NULL || PyList_Append(list, item);
    Py_XDECREF(item);
    return failed ? -1 : 0;
}

int tlcore_note(walker_object *walker, PyObject *spec, PyObject *memory, Py_ssize_t begin)
{
    return PyList_Append(walker->specs, spec) || PyList_Append(walker->memories, memory) ||
           append_number(walker->offsets, begin);
}

/* 1 where the tensor was taken, 0 where it must go the long way, -1 with an exception set. */
static int take_plain(walker_object *walker, PyObject *tensor)
{
    dlpack_tensor view;
    tlcore_source source;
    memory_object *memory = (memory_object *)walker->memory;
    if (memory == NULL || !tlcore_look(tensor, &view))
        return 0;
    const known_spec *known = tlcore_find(&walker->known, tensor, &view);
    if (known == NULL)
        return 0;
    Py_ssize_t begin = memory->bytes, bytes = known->nbytes;
    if (!tlcore_find_source(&view, bytes, &source))
        return 0;
    const taken_copy *taken = tlcore_find_taken(&walker->taken, &source);
    if (taken != NULL)
        return tlcore_note(walker, known->spec, taken->memory, taken->begin) ? -1 : 1;
    if (begin < 0 || memory->size < begin || memory->size - begin < bytes)
        return 0;
    uint64_t batch = walker->taken.batch;
    /* Noted before the bytes are copied: without the lock, others may run. */
    PyObject *spec = Py_NewRef(known->spec), *held = Py_NewRef(walker->memory);
    memory->bytes = begin + ((bytes + 63) & ~(Py_ssize_t)63);
    int failed = tlcore_note(walker, spec, held, begin);
    if (!failed && bytes) {
        tlcore_copy_source((char *)memory->address + begin, &source);
        tlcore_note_taken(&walker->taken, &source, held, begin, batch);
    }
    Py_DECREF(spec);
    Py_DECREF(held);
    return failed ? -1 : 1;
}

/* -1 with an exception set. */
static int take_tensor(walker_object *walker, PyObject *tensor)
{
    int taken = tlcore_can_look() && tlcore_is_tensor(tensor) ? take_plain(walker, tensor) : 0;
    if (taken)
        return taken < 0 ? -1 : 0;
    PyObject *done = PyObject_CallFunctionObjArgs(walker->tensor, tensor, NULL);
    Py_XDECREF(done);
    return done == NULL ? -1 : 0;
}

/* --- structures --- */

static PyObject *other(walker_object *walker, PyObject *value, const containers *seen)
{
    PyObject *ids = PyTuple_New(seen->depth);
    for (int i = 0; ids != NULL && i < seen->depth; i++) {
        PyObject *id = PyLong_FromVoidPtr((void *)seen->inside[i]);
        if (id == NULL)
            Py_CLEAR(ids);
        else
            PyTuple_SetItem(ids, i, id);
    }
    if (ids == NULL)
        return NULL;
    PyObject *sketch = PyObject_CallFunctionObjArgs(walker->other, value, ids, NULL);
    Py_DECREF(ids);
    return sketch;
}

static PyObject *flatten_tuple(walker_object *walker, PyObject *value, containers *seen)
{
    Py_ssize_t count = PyTuple_Size(value);
    PyObject *items = PyTuple_New(count);
    for (Py_ssize_t i = 0; items != NULL && i < count; i++) {
        PyObject *item = tlcore_flatten(walker, PyTuple_GetItem(value, i), seen);
        if (item == NULL)
            Py_CLEAR(items);
        else
            PyTuple_SetItem(items, i, item);
    }
    return items;
}

static PyObject *flatten_list(walker_object *walker, PyObject *value, containers *seen)
{
    PyObject *list = PyList_New(0);
    /* What is called on the way may shorten or lengthen it. */
    for (Py_ssize_t i = 0; list != NULL && i < PyList_Size(value); i++) {
        PyObject *held = Py_NewRef(PyList_GetItem(value, i));
        PyObject *item = tlcore_flatten(walker, held, seen);
        if (item == NULL || PyList_Append(list, item))
            Py_CLEAR(list);
        Py_XDECREF(item);
        Py_DECREF(held);
    }
    PyObject *items = list == NULL ? NULL : PyList_AsTuple(list);
    Py_XDECREF(list);
    return items;
}

static int all_plain_text(PyObject *keys)
{
    for (Py_ssize_t i = 0; i < PyTuple_Size(keys); i++)
        if (!PyUnicode_CheckExact(PyTuple_GetItem(keys, i)))
            return 0;
    return 1;
}

static PyObject *flatten_dict(walker_object *walker, PyObject *value, containers *seen)
{
    PyObject *key_list = PyDict_Keys(value), *value_list = PyDict_Values(value), *sketch = NULL, *items = NULL;
    PyObject *keys = key_list == NULL ? NULL : PyList_AsTuple(key_list);
    PyObject *values = value_list == NULL ? NULL : PyList_AsTuple(value_list);
    if (keys != NULL && values != NULL) {
        if (!all_plain_text(keys)) {
            seen->depth--;
            sketch = other(walker, value, seen);
            seen->depth++;
        } else if ((items = flatten_tuple(walker, values, seen)) != NULL) {
            sketch = PyTuple_Pack(3, tlcore_dict_word, keys, items);
        }
    }
    Py_XDECREF(key_list);
    Py_XDECREF(value_list);
    Py_XDECREF(keys);
    Py_XDECREF(values);
    Py_XDECREF(items);
    return sketch;
}

static int contains(const containers *seen, const PyObject *value)
{
    for (int i = 0; i < seen->depth; i++)
        if (seen->inside[i] == value)
            return 1;
    return 0;
}

static PyObject *flatten_container(walker_object *walker, PyObject *value, containers *seen)
{
    if (seen->depth >= TLCORE_DEEPEST || contains(seen, value))
        return other(walker, value, seen);
    seen->inside[seen->depth++] = value;
    PyObject *sketch = NULL, *items;
    if (PyDict_CheckExact(value)) {
        sketch = flatten_dict(walker, value, seen);
    } else {
        int is_tuple = PyTuple_CheckExact(value);
        items = is_tuple ? flatten_tuple(walker, value, seen) : flatten_list(walker, value, seen);
        if (items != NULL)
            sketch = PyTuple_Pack(2, is_tuple ? tlcore_tuple_word : tlcore_list_word, items);
        Py_XDECREF(items);
    }
    seen->depth--;
    return sketch;
}

int tlcore_is_scalar(PyObject *value)
{
    return PyLong_CheckExact(value) || PyFloat_CheckExact(value) || PyBool_Check(value) || PyUnicode_CheckExact(value);
}

PyObject *tlcore_flatten(walker_object *walker, PyObject *value, containers *seen)
{
    if (tlcore_is_some_tensor(value))
        return take_tensor(walker, value) ? NULL : Py_NewRef(tlcore_tensor_word);
    if (value == Py_None)
        return Py_NewRef(tlcore_none_word);
    if (tlcore_is_scalar(value))
        return PyList_Append(walker->scalars, value) ? NULL : Py_NewRef(tlcore_scalar_word);
    if (PyTuple_CheckExact(value) || PyList_CheckExact(value))
        return flatten_container(walker, value, seen);
    if (PyDict_CheckExact(value))
        return PyDict_Size(value) == 0 ? Py_NewRef(no_items) : flatten_container(walker, value, seen);
    return other(walker, value, seen);
}

int tlcore_make_words(void)
{
    tlcore_tensor_word = PyUnicode_InternFromString("tensor");
    tlcore_scalar_word = PyUnicode_InternFromString("scalar");
    tlcore_none_word = PyUnicode_InternFromString("none");
    tlcore_tuple_word = PyUnicode_InternFromString("tuple");
    tlcore_list_word = PyUnicode_InternFromString("list");
    tlcore_dict_word = PyUnicode_InternFromString("dict");
    if (!tlcore_tensor_word || !tlcore_scalar_word || !tlcore_none_word || !tlcore_tuple_word || !tlcore_list_word || !tlcore_dict_word)
        return -1;
    no_items = Py_BuildValue("(O()())", tlcore_dict_word);
    return no_items == NULL ? -1 : 0;
}
