/* Whether the inputs of an operator are what they were: the same plain values, tensors from the same places. */
#include "using.h"

#include "looking.h"

/* Of longer containers not everything is told. */
#define MOST_ITEMS 64
#define DEEPEST 4

PyObject *tlcore_version_name;
static PyObject *items_word, *start_name, *stop_name, *step_name;

/* Whether a tensor is known as this operand, and was not changed in place since; -1 with an exception set. */
static int is_known_as(using_object *mine, PyObject *tensor, PyObject *operand)
{
    PyObject *key = PyLong_FromVoidPtr(tensor);
    PyObject *entry = key == NULL ? NULL : PyDict_GetItemWithError(mine->known, key);
    Py_XDECREF(key);
    if (entry == NULL || !PyTuple_Check(entry) || PyTuple_Size(entry) != 3)
        return PyErr_Occurred() ? -1 : 0;
    Py_INCREF(entry);
    PyObject *alive = PyObject_CallNoArgs(PyTuple_GetItem(entry, 0));
    int same = alive == NULL ? -1 : alive == tensor;
    Py_XDECREF(alive);
    if (same > 0)
        same = PyObject_RichCompareBool(PyTuple_GetItem(entry, 1), operand, Py_EQ);
    if (same > 0) {
        long long then = PyLong_AsLongLong(PyTuple_GetItem(entry, 2));
        if (then >= 0) {
            PyObject *now = PyObject_GetAttr(tensor, tlcore_version_name);
            same = now == NULL ? -1 : PyObject_RichCompareBool(now, PyTuple_GetItem(entry, 2), Py_EQ);
            Py_XDECREF(now);
        }
    }
    Py_DECREF(entry);
    return same < 0 || PyErr_Occurred() ? -1 : same;
}

/* The same of a tuple or list of tensors; 0 also where only Python can tell. */
static int are_known_as(using_object *mine, PyObject *value, PyObject *operand)
{
    int is_tuple = PyTuple_CheckExact(value), same = 1;
    if (!(is_tuple || PyList_CheckExact(value)) || !PyTuple_Check(operand) || PyTuple_Size(operand) != 2)
        return 0;
    PyObject *word = PyTuple_GetItem(operand, 0), *items = PyTuple_GetItem(operand, 1);
    Py_ssize_t count = is_tuple ? PyTuple_Size(value) : PyList_Size(value);
    if (!PyTuple_Check(items) || PyTuple_Size(items) != count || count > MOST_ITEMS || !PyUnicode_Check(word) ||
        PyUnicode_Compare(word, items_word))
        return PyErr_Occurred() ? -1 : 0;
    for (Py_ssize_t i = 0; same > 0 && i < count; i++) {
        PyObject *each = is_tuple ? PyTuple_GetItem(value, i) : PyList_GetItem(value, i);
        if (each == NULL)
            return -1;
        Py_INCREF(each);
        same = tlcore_is_some_tensor(each) ? is_known_as(mine, each, PyTuple_GetItem(items, i)) : 0;
        Py_DECREF(each);
    }
    return same;
}

/* Whether a tensor is known as whatever it is, or a value is none that may hold one; -1 with an exception set. */
static int is_known(using_object *mine, PyObject *value)
{
    PyObject *key = PyLong_FromVoidPtr(value);
    PyObject *entry = key == NULL ? NULL : PyDict_GetItemWithError(mine->known, key);
    Py_XDECREF(key);
    if (entry == NULL && PyErr_Occurred())
        return -1;
    if (entry == NULL || !PyTuple_Check(entry) || PyTuple_Size(entry) != 3)
        return value == Py_None || PyBool_Check(value) || PyLong_CheckExact(value) || PyFloat_CheckExact(value) ||
               PyUnicode_CheckExact(value);
    PyObject *alive = PyObject_CallNoArgs(PyTuple_GetItem(entry, 0));
    int same = alive == NULL ? -1 : alive == value;
    Py_XDECREF(alive);
    return same;
}

static int is_known_pair(using_object *mine, PyObject *value)
{
    if (!PyTuple_CheckExact(value))
        return is_known(mine, value);
    int known = 1;
    for (Py_ssize_t i = 0; known > 0 && i < PyTuple_Size(value); i++)
        known = is_known(mine, PyTuple_GetItem(value, i));
    return known;
}

int tlcore_knows(using_object *mine, PyObject *value)
{
    int known = 1;
    if (PyTuple_CheckExact(value)) {
        for (Py_ssize_t i = 0; known > 0 && i < PyTuple_Size(value); i++)
            known = is_known_pair(mine, PyTuple_GetItem(value, i));
        return known;
    }
    if (!PyDict_CheckExact(value))
        return is_known(mine, value);
    PyObject *key, *item;
    Py_ssize_t place = 0;
    while (known > 0 && PyDict_Next(value, &place, &key, &item)) {
        Py_INCREF(item);
        known = is_known_pair(mine, item);
        Py_DECREF(item);
    }
    return known;
}

/* Whether a value that is asked for each time is the same operand as once. */
static int is_operand(using_object *mine, PyObject *value, PyObject *operand)
{
    int same = tlcore_is_some_tensor(value) ? is_known_as(mine, value, operand) : are_known_as(mine, value, operand);
    if (same)
        return same;
    PyObject *found = PyObject_CallFunctionObjArgs(mine->of, value, NULL);
    same = found == NULL ? -1 : PyObject_RichCompareBool(found, operand, Py_EQ);
    Py_XDECREF(found);
    return same;
}

static int is_same(PyObject *value, PyObject *old, int depth);

static int is_same_part(PyObject *value, PyObject *old, PyObject *name, int depth)
{
    PyObject *one = PyObject_GetAttr(value, name), *other = one == NULL ? NULL : PyObject_GetAttr(old, name);
    int same = other == NULL ? -1 : is_same(one, other, depth);
    Py_XDECREF(one);
    Py_XDECREF(other);
    return same;
}

/* Whether plain values are the same, and of the same types all through: 1, 1.0 and True are equal. */
static int is_same(PyObject *value, PyObject *old, int depth)
{
    int same = 1;
    if (value == old)
        return 1;
    if (Py_TYPE(value) != Py_TYPE(old) || depth > DEEPEST)
        return 0;
    if (PyTuple_CheckExact(value)) {
        Py_ssize_t count = PyTuple_Size(value);
        if (PyTuple_Size(old) != count)
            return 0;
        for (Py_ssize_t i = 0; same > 0 && i < count; i++)
            same = is_same(PyTuple_GetItem(value, i), PyTuple_GetItem(old, i), depth + 1);
        return same;
    }
    if (Py_TYPE(value) == &PySlice_Type) {
        PyObject *const names[] = {start_name, stop_name, step_name};
        for (int i = 0; same > 0 && i < 3; i++)
            same = is_same_part(value, old, names[i], depth + 1);
        return same;
    }
    return PyObject_RichCompareBool(value, old, Py_EQ);
}

static int is_still(using_object *mine, PyObject *value, PyObject *old, PyObject *operand)
{
    return old == mine->ask ? is_operand(mine, value, operand) : is_same(value, old, 0);
}

int tlcore_are_still(using_object *mine, PyObject *values, PyObject *before, PyObject *operands)
{
    Py_ssize_t count = PyTuple_Size(values);
    if (!PyTuple_Check(before) || !PyTuple_Check(operands) || PyTuple_Size(before) != count ||
        PyTuple_Size(operands) != count)
        return 0;
    int same = 1;
    for (Py_ssize_t i = 0; same > 0 && i < count; i++)
        same = is_still(mine, PyTuple_GetItem(values, i), PyTuple_GetItem(before, i), PyTuple_GetItem(operands, i));
    return same;
}

int tlcore_keywords_are_still(using_object *mine, PyObject *kwargs, PyObject *planned)
{
    PyObject *keys = PyTuple_GetItem(planned, USE_KEYS), *before = PyTuple_GetItem(planned, USE_KWARGS);
    PyObject *operands = PyTuple_GetItem(planned, USE_KEYWORDS), *key, *value;
    Py_ssize_t count = PyDict_Size(kwargs), place = 0;
    if (!PyTuple_Check(keys) || !PyTuple_Check(before) || !PyTuple_Check(operands) || PyTuple_Size(keys) != count ||
        PyTuple_Size(before) != count || PyTuple_Size(operands) != count)
        return 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        /* What is asked may change the dictionary. */
        if (!PyDict_Next(kwargs, &place, &key, &value) || !PyUnicode_Check(key) ||
            PyUnicode_Compare(key, PyTuple_GetItem(keys, i)))
            return PyErr_Occurred() ? -1 : 0;
        Py_INCREF(value);
        int same = is_still(mine, value, PyTuple_GetItem(before, i), PyTuple_GetItem(operands, i));
        Py_DECREF(value);
        if (same <= 0)
            return same;
    }
    return 1;
}

int tlcore_make_operand_words(void)
{
    tlcore_version_name = PyUnicode_InternFromString("_version");
    items_word = PyUnicode_InternFromString("items");
    start_name = PyUnicode_InternFromString("start");
    stop_name = PyUnicode_InternFromString("stop");
    step_name = PyUnicode_InternFromString("step");
    return tlcore_version_name && items_word && start_name && stop_name && step_name ? 0 : -1;
}
