/* Standing in for a module's `forward`: the objects that do, and how many are put in place at once. */
#include "listening.h"

#include <structmember.h>

PyTypeObject *tlcore_sides_type;
static PyTypeObject *hearing_type, *listening_type;
static PyObject *self_name, *function_name;

/* --- putting many in place --- */

static listening_object *listening_at(PyObject *all, Py_ssize_t i)
{
    PyObject *each = PyList_GetItem(all, i);
    if (each == NULL || Py_TYPE(each) != listening_type || ((listening_object *)each)->own == NULL) {
        PyErr_Format(PyExc_TypeError, "item %zd is no Listening", i);
        return NULL;
    }
    return (listening_object *)each;
}

static int is_there(const listening_object *one, const PyObject *expected)
{
    PyObject *found = PyDict_GetItemWithError(one->own, tlcore_forward_key);
    return found == NULL ? expected == Py_None : found == expected;
}

/* The first place from `begin` on where something unusual is found; the length of the lists where all is done. */
static PyObject *each_from(PyObject *args, int (*put)(listening_object *, PyObject *))
{
    PyObject *listeners, *all;
    Py_ssize_t i;
    if (!PyArg_ParseTuple(args, "O!O!n", &PyList_Type, &listeners, &PyList_Type, &all, &i))
        return NULL;
    for (; i >= 0 && i < PyList_Size(all); i++) {
        listening_object *one = listening_at(all, i);
        PyObject *listener = one == NULL ? NULL : PyList_GetItem(listeners, i);
        if (listener == NULL)
            return NULL;
        Py_INCREF(listener);
        int usual = put(one, listener);
        Py_DECREF(listener);
        if (usual < 0)
            return NULL;
        if (!usual)
            break;
    }
    return PyLong_FromSsize_t(i);
}

static int put_one(listening_object *one, PyObject *listener)
{
    if (one->dead || !is_there(one, one->replaced))
        return PyErr_Occurred() ? -1 : 0;
    one->count = one->elsewhere = 0;
    return PyDict_SetItem(one->own, tlcore_forward_key, listener) ? -1 : 1;
}

static int take_one(listening_object *one, PyObject *listener)
{
    if (one->covered || one->replaced != Py_None || !is_there(one, listener) || PyList_Size(one->handles) != 0)
        return PyErr_Occurred() ? -1 : 0;
    return PyDict_DelItem(one->own, tlcore_forward_key) ? -1 : 1;
}

static PyObject *put_all(PyObject *module, PyObject *args)
{
    (void)module;
    return each_from(args, put_one);
}

static PyObject *take_all(PyObject *module, PyObject *args)
{
    (void)module;
    return each_from(args, take_one);
}

/* --- the types --- */

static PyMemberDef hearing_members[] = {
    {"owner", T_ULONG, offsetof(hearing_object, owner), 0, "The thread whose calls are heard, 0 for none."},
    {NULL, 0, 0, 0, NULL},
};

static PyType_Slot hearing_slots[] = {{Py_tp_members, hearing_members}, {0, NULL}};

static PyType_Spec hearing_spec = {
    .name = "tlcore.hotpath._native.Hearing",
    .basicsize = sizeof(hearing_object),
    .flags = Py_TPFLAGS_DEFAULT,
    .slots = hearing_slots,
};

static PyMemberDef sides_members[] = {
    {"inputs", T_OBJECT_EX, offsetof(sides_object, inputs), 0, "By the structures of arguments."},
    {"outputs", T_OBJECT_EX, offsetof(sides_object, outputs), 0, "By the structures of results."},
    {NULL, 0, 0, 0, NULL},
};

static int sides_traverse(PyObject *self, visitproc visit, void *arg)
{
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(((sides_object *)self)->inputs);
    Py_VISIT(((sides_object *)self)->outputs);
    int stopped = tlcore_visit_last(&((sides_object *)self)->given, visit, arg);
    return stopped ? stopped : tlcore_visit_last(&((sides_object *)self)->returned, visit, arg);
}

static int sides_clear(PyObject *self)
{
    Py_CLEAR(((sides_object *)self)->inputs);
    Py_CLEAR(((sides_object *)self)->outputs);
    tlcore_forget_last(&((sides_object *)self)->given);
    tlcore_forget_last(&((sides_object *)self)->returned);
    return 0;
}

static void free_object(PyObject *self, int (*clear)(PyObject *))
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    clear(self);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static void sides_free(PyObject *self)
{
    free_object(self, sides_clear);
}

static PyType_Slot sides_slots[] = {
    {Py_tp_members, sides_members}, {Py_tp_dealloc, sides_free},
    {Py_tp_traverse, sides_traverse}, {Py_tp_clear, sides_clear},
    {0, NULL},
};

static PyType_Spec sides_spec = {
    .name = "tlcore.hotpath._native.KnownSides",
    .basicsize = sizeof(sides_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_GC,
    .slots = sides_slots,
};

static int listening_init(PyObject *self, PyObject *args, PyObject *kwargs)
{
    listening_object *mine = (listening_object *)self;
    static char *names[] = {"walker", "collector", "hearing", "own", "sites", "handles", "post", NULL};
    PyObject *walker, *collector, *hearing, *own, *sites, *handles;
    int post;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOO!O!O!O!p:Listening", names, &walker, &collector, hearing_type,
                                     &hearing, &PyDict_Type, &own, &PyList_Type, &sites, &PyList_Type, &handles,
                                     &post))
        return -1;
    if (!tlcore_is_walker(walker)) {
        PyErr_Format(PyExc_TypeError, "%R is no Walker in use", walker);
        return -1;
    }
    tlcore_set(&mine->walker, walker);
    tlcore_set(&mine->collector, collector);
    tlcore_set(&mine->hearing, hearing);
    tlcore_set(&mine->own, own);
    tlcore_set(&mine->sites, sites);
    tlcore_set(&mine->handles, handles);
    tlcore_set(&mine->replaced, Py_None);
    mine->post = (char)post;
    mine->running = -1;
    return 0;
}

static int listening_traverse(PyObject *self, visitproc visit, void *arg)
{
    listening_object *mine = (listening_object *)self;
    Py_VISIT(Py_TYPE(self));
    Py_VISIT(mine->walker);
    Py_VISIT(mine->collector);
    Py_VISIT(mine->hearing);
    Py_VISIT(mine->own);
    Py_VISIT(mine->original);
    Py_VISIT(mine->replaced);
    Py_VISIT(mine->sites);
    Py_VISIT(mine->handles);
    Py_VISIT(mine->module);
    Py_VISIT(mine->given);
    return 0;
}

static int listening_clear(PyObject *self)
{
    listening_object *mine = (listening_object *)self;
    Py_CLEAR(mine->original);
    Py_CLEAR(mine->walker);
    Py_CLEAR(mine->collector);
    Py_CLEAR(mine->hearing);
    Py_CLEAR(mine->own);
    Py_CLEAR(mine->replaced);
    Py_CLEAR(mine->sites);
    Py_CLEAR(mine->handles);
    Py_CLEAR(mine->module);
    Py_CLEAR(mine->given);
    return 0;
}

static void listening_free(PyObject *self)
{
    free_object(self, listening_clear);
}

static PyObject *aim(PyObject *self, PyObject *args)
{
    listening_object *mine = (listening_object *)self;
    PyObject *original, *replaced;
    if (!PyArg_ParseTuple(args, "OO:aim", &original, &replaced))
        return NULL;
    if (mine->own == NULL)
        return PyErr_Format(PyExc_RuntimeError, "it was not made whole");
    tlcore_set(&mine->original, original);
    tlcore_set(&mine->replaced, replaced);
    Py_CLEAR(mine->module);
    Py_CLEAR(mine->given);
    if (replaced == Py_None) {
        mine->module = PyObject_GetAttr(original, self_name);
        mine->given = mine->module == NULL ? NULL : PyObject_GetAttr(original, function_name);
        PyErr_Clear();
        if (mine->given != NULL && tlcore_is_exchanged(mine))
            Py_CLEAR(mine->given);
    }
    Py_RETURN_NONE;
}

static PyObject *deafen(PyObject *self, PyObject *hearing)
{
    listening_object *mine = (listening_object *)self;
    if (Py_TYPE(hearing) != hearing_type)
        return PyErr_Format(PyExc_TypeError, "%R is no Hearing", hearing);
    tlcore_set(&mine->hearing, hearing);
    mine->dead = 1;
    Py_RETURN_NONE;
}

static PyMemberDef listening_members[] = {
    {"count", T_PYSSIZET, offsetof(listening_object, count), 0, "The step's calls so far."},
    {"elsewhere", T_PYSSIZET, offsetof(listening_object, elsewhere), 0, "Those in other threads."},
    {"running", T_PYSSIZET, offsetof(listening_object, running), 0, "The call that runs, -1 for none."},
    {"covered", T_BOOL, offsetof(listening_object, covered), 0, "Whether others have put something around it."},
    {"dead", T_BOOL, offsetof(listening_object, dead), 0, "Whether it never stands in again."},
    {NULL, 0, 0, 0, NULL},
};

static PyMethodDef listening_methods[] = {
    {"hear", (PyCFunction)(void (*)(void))tlcore_hear, METH_FASTCALL, "One call of what it stands for."},
    {"aim", aim, METH_VARARGS, "What it stands for, and what the module's own dictionary had under its name."},
    {"deafen", deafen, METH_O, "Hear nobody but this `Hearing`, and stand in no more."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot listening_slots[] = {
    {Py_tp_new, PyType_GenericNew}, {Py_tp_init, listening_init}, {Py_tp_dealloc, listening_free},
    {Py_tp_traverse, listening_traverse}, {Py_tp_clear, listening_clear},
    {Py_tp_methods, listening_methods}, {Py_tp_members, listening_members},
    {0, NULL},
};

static PyType_Spec listening_spec = {
    .name = "tlcore.hotpath._native.Listening",
    .basicsize = sizeof(listening_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = listening_slots,
};

static PyMethodDef functions[] = {
    {"put_all", put_all, METH_VARARGS, "Put listeners in their places, up to the first unusual one."},
    {"take_all", take_all, METH_VARARGS, "Take listeners away, up to the first unusual one."},
    {NULL, NULL, 0, NULL},
};

int tlcore_add_listening(PyObject *module)
{
    self_name = PyUnicode_InternFromString("__self__");
    function_name = PyUnicode_InternFromString("__func__");
    if (self_name == NULL || function_name == NULL || PyModule_AddFunctions(module, functions))
        return -1;
    hearing_type = (PyTypeObject *)PyType_FromSpec(&hearing_spec);
    tlcore_sides_type = (PyTypeObject *)PyType_FromSpec(&sides_spec);
    listening_type = (PyTypeObject *)PyType_FromSpec(&listening_spec);
    if (hearing_type == NULL || tlcore_sides_type == NULL || listening_type == NULL)
        return -1;
    return PyModule_AddObjectRef(module, "Hearing", (PyObject *)hearing_type) ||
                   PyModule_AddObjectRef(module, "KnownSides", (PyObject *)tlcore_sides_type) ||
                   PyModule_AddObjectRef(module, "Listening", (PyObject *)listening_type)
               ? -1
               : 0;
}
