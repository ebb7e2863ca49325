/* The object that walks structures: what it fills, what it knows, and the sides of calls that it adds. */
#include "again.h"

#include <structmember.h>

static PyTypeObject *memory_type, *walker_type;

static PyMemberDef memory_members[] = {
    {"address", T_PYSSIZET, offsetof(memory_object, address), 0, "Where it begins."},
    {"size", T_PYSSIZET, offsetof(memory_object, size), 0, "Its size in bytes."},
    {"bytes", T_PYSSIZET, offsetof(memory_object, bytes), 0, "How many are filled, from the front."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot memory_slots[] = {
    {Py_tp_members, memory_members},
    {Py_tp_doc, "Memory that is filled from the front."},
    {0, NULL},
};

static PyType_Spec memory_spec = {
    .name = "tlcore.hotpath._native.Memory",
    .basicsize = sizeof(memory_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
    .slots = memory_slots,
};

int tlcore_set(PyObject **place, PyObject *value)
{
    PyObject *before = *place;
    *place = Py_XNewRef(value);
    Py_XDECREF(before);
    return 0;
}

static int walker_init(PyObject *self, PyObject *args, PyObject *kwargs)
{
    walker_object *walker = (walker_object *)self;
    static char *names[] = {"tensor", "other", NULL};
    PyObject *tensor, *otherwise;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OO:Walker", names, &tensor, &otherwise))
        return -1;
    tlcore_set(&walker->tensor, tensor);
    return tlcore_set(&walker->other, otherwise);
}

static int walker_traverse(PyObject *self, visitproc visit, void *arg)
{
    walker_object *walker = (walker_object *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(walker->tensor);
    Py_VISIT(walker->other);
    Py_VISIT(walker->memory);
    Py_VISIT(walker->sides);
    Py_VISIT(walker->specs);
    Py_VISIT(walker->memories);
    Py_VISIT(walker->offsets);
    Py_VISIT(walker->scalars);
    Py_VISIT(walker->full);
    Py_VISIT(walker->sketches);
    return tlcore_traverse(&walker->known, visit, arg);
}

static int walker_clear(PyObject *self)
{
    walker_object *walker = (walker_object *)self;
    Py_CLEAR(walker->tensor);
    Py_CLEAR(walker->other);
    Py_CLEAR(walker->memory);
    Py_CLEAR(walker->sides);
    Py_CLEAR(walker->specs);
    Py_CLEAR(walker->memories);
    Py_CLEAR(walker->offsets);
    Py_CLEAR(walker->scalars);
    Py_CLEAR(walker->full);
    Py_CLEAR(walker->sketches);
    tlcore_forget_taken(&walker->taken);
    tlcore_forget(&walker->known);
    return 0;
}

static void walker_free(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    walker_clear(self);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

int tlcore_is_memory(PyObject *object)
{
    return PyType_IsSubtype(Py_TYPE(object), memory_type);
}

int tlcore_is_walker(PyObject *object)
{
    return Py_TYPE(object) == walker_type && ((walker_object *)object)->scalars != NULL &&
           ((walker_object *)object)->other != NULL;
}

static PyObject *walker_use(PyObject *self, PyObject *args)
{
    walker_object *walker = (walker_object *)self;
    PyObject *sides, *specs, *memories, *offsets, *scalars;
    if (!PyArg_ParseTuple(args, "O!O!O!O!O!:use", &PyList_Type, &sides, &PyList_Type, &specs, &PyList_Type,
                          &memories, &PyList_Type, &offsets, &PyList_Type, &scalars))
        return NULL;
    tlcore_forget_taken(&walker->taken);
    tlcore_set(&walker->sides, sides);
    tlcore_set(&walker->specs, specs);
    tlcore_set(&walker->memories, memories);
    tlcore_set(&walker->offsets, offsets);
    tlcore_set(&walker->scalars, scalars);
    Py_RETURN_NONE;
}

static PyObject *walker_fill(PyObject *self, PyObject *memory)
{
    if (memory != Py_None && !PyType_IsSubtype(Py_TYPE(memory), memory_type))
        return PyErr_Format(PyExc_TypeError, "%R is no Memory", memory);
    tlcore_set(&((walker_object *)self)->memory, memory == Py_None ? NULL : memory);
    Py_RETURN_NONE;
}

static PyObject *walker_watch(PyObject *self, PyObject *full)
{
    if (!PyList_Check(full))
        return PyErr_Format(PyExc_TypeError, "%R is no list", full);
    tlcore_set(&((walker_object *)self)->full, full);
    Py_RETURN_NONE;
}

static PyObject *walker_know(PyObject *self, PyObject *args)
{
    PyObject *tensor, *spec;
    Py_ssize_t nbytes;
    if (!PyArg_ParseTuple(args, "OOn:know", &tensor, &spec, &nbytes))
        return NULL;
    if (tlcore_know(&((walker_object *)self)->known, tensor, spec, nbytes))
        return NULL;
    Py_RETURN_NONE;
}

static PyObject *walker_forget(PyObject *self, PyObject *nothing)
{
    (void)nothing;
    tlcore_forget(&((walker_object *)self)->known);
    Py_RETURN_NONE;
}

static PyObject *walker_flatten(PyObject *self, PyObject *value)
{
    containers seen = {.depth = 0};
    if (!tlcore_is_walker(self))
        return PyErr_Format(PyExc_RuntimeError, "call use() first");
    return tlcore_flatten((walker_object *)self, value, &seen);
}

/* Add the side that is known for a key: it, or NULL, with an exception set where that is not for lack of one. */
static PyObject *add_known(walker_object *walker, PyObject *sides, PyObject *key)
{
    PyObject *side = PyDict_GetItemWithError(sides, key);
    if (side == NULL)
        return NULL;
    Py_INCREF(side);
    if (PyList_Append(walker->sides, side))
        Py_CLEAR(side);
    return side;
}

static PyObject *flatten_arguments(walker_object *walker, last_structure *last, PyObject *sides, PyObject *args,
                                   PyObject *kwargs)
{
    containers seen = {.depth = 0};
    PyObject *keywords = NULL, *both = NULL, *side = NULL;
    PyObject *positional = tlcore_flatten(walker, args, &seen);
    int has_keywords = PyDict_Size(kwargs) > 0;
    if (positional != NULL)
        keywords = tlcore_flatten(walker, kwargs, &seen);
    if (keywords != NULL)
        both = PyTuple_Pack(2, positional, keywords);
    if (both != NULL)
        side = add_known(walker, sides, has_keywords ? both : positional);
    if (side != NULL && last != NULL)
        tlcore_remember(walker, last, positional, has_keywords ? keywords : NULL, side);
    Py_XDECREF(positional);
    Py_XDECREF(keywords);
    if (side != NULL || PyErr_Occurred())
        Py_CLEAR(both);
    if (side == NULL)
        return both;
    Py_DECREF(side);
    return Py_NewRef(Py_None);
}

PyObject *tlcore_take_arguments(walker_object *walker, last_structure *last, PyObject *sides, PyObject *args,
                                PyObject *kwargs)
{
    int taken = last == NULL ? 0 : tlcore_take_again(walker, last, args, kwargs);
    if (taken)
        return taken < 0 ? NULL : Py_NewRef(Py_None);
    return flatten_arguments(walker, last, sides, args, kwargs);
}

PyObject *tlcore_take_result(walker_object *walker, last_structure *last, PyObject *sides, PyObject *value)
{
    containers seen = {.depth = 0};
    int taken = last == NULL ? 0 : tlcore_take_again(walker, last, value, NULL);
    if (taken)
        return taken < 0 ? NULL : Py_NewRef(Py_None);
    PyObject *sketch = tlcore_flatten(walker, value, &seen);
    if (sketch == NULL)
        return NULL;
    PyObject *side = add_known(walker, sides, sketch);
    if (side == NULL) {
        if (PyErr_Occurred())
            Py_CLEAR(sketch);
        return sketch;
    }
    if (last != NULL)
        tlcore_remember(walker, last, sketch, NULL, side);
    Py_DECREF(sketch);
    Py_DECREF(side);
    return Py_NewRef(Py_None);
}

static PyObject *walker_arguments(PyObject *self, PyObject *args)
{
    PyObject *sides, *positional, *keywords;
    if (!tlcore_is_walker(self))
        return PyErr_Format(PyExc_RuntimeError, "call use() first");
    if (!PyArg_ParseTuple(args, "O!O!O!:arguments", &PyDict_Type, &sides, &PyTuple_Type, &positional,
                          &PyDict_Type, &keywords))
        return NULL;
    return tlcore_take_arguments((walker_object *)self, NULL, sides, positional, keywords);
}

static PyObject *walker_result(PyObject *self, PyObject *args)
{
    PyObject *sides, *value;
    if (!tlcore_is_walker(self))
        return PyErr_Format(PyExc_RuntimeError, "call use() first");
    if (!PyArg_ParseTuple(args, "O!O:result", &PyDict_Type, &sides, &value))
        return NULL;
    return tlcore_take_result((walker_object *)self, NULL, sides, value);
}

static PyMethodDef walker_methods[] = {
    {"use", walker_use, METH_VARARGS, "Fill these lists: sides, specs, memories, offsets, scalars."},
    {"arguments", walker_arguments, METH_VARARGS,
     "Take a call's arguments and add their side; where none is known, both sketches are returned instead."},
    {"result", walker_result, METH_VARARGS,
     "Take a call's result and add its side; where none is known, the sketch is returned instead."},
    {"fill", walker_fill, METH_O, "Copy into this memory, None for none."},
    {"watch", walker_watch, METH_O, "Call for the collector after a side while there is something in this list."},
    {"know", walker_know, METH_VARARGS, "Plain tensors of this one's dtype and shape have this spec."},
    {"forget", walker_forget, METH_NOARGS, "Know nothing."},
    {"flatten", walker_flatten, METH_O, "The sketch of a value, whose leaves are taken."},
    {NULL, NULL, 0, NULL},
};

static PyMemberDef walker_members[] = {
    {"leaving", T_BOOL, offsetof(walker_object, leaving), 0, "Whether results are taken, not arguments."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot walker_slots[] = {
    {Py_tp_members, walker_members},
    {Py_tp_new, PyType_GenericNew},  {Py_tp_init, walker_init},   {Py_tp_dealloc, walker_free},
    {Py_tp_traverse, walker_traverse}, {Py_tp_clear, walker_clear}, {Py_tp_methods, walker_methods},
    {0, NULL},
};

static PyType_Spec walker_spec = {
    .name = "tlcore.hotpath._native.Walker",
    .basicsize = sizeof(walker_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = walker_slots,
};

int tlcore_add_walker(PyObject *module)
{
    if (tlcore_make_words())
        return -1;
    memory_type = (PyTypeObject *)PyType_FromSpec(&memory_spec);
    walker_type = (PyTypeObject *)PyType_FromSpec(&walker_spec);
    if (memory_type == NULL || walker_type == NULL)
        return -1;
    return PyModule_AddObjectRef(module, "Memory", (PyObject *)memory_type) ||
                   PyModule_AddObjectRef(module, "Walker", (PyObject *)walker_type)
               ? -1
               : 0;
}
