/* Standing in for a module's `forward`: counting its calls, and taking what the wanted ones are given and return.
 *
 * Python's part stays in charge: whatever is not the usual case (a structure seen for the first time, hooks of
 * others, an error) is handed to the listener or the collector, and said there.
 */
#include "again.h"

#include <pythread.h>
#include <structmember.h>

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

static PyTypeObject *hearing_type, *sides_type, *listening_type;
static PyObject *global_hooks, *backward, *tracing, *modes, *flags, *flag;
static PyObject *forward_key, *hooks_key, *inputs_word, *outputs_word;
static PyObject *new_call_name, *raised_name, *behind_name, *arguments_name, *result_name, *broken_name, *post_name;
static PyObject *covered_name, *traced_name, *anew_name, *self_name, *function_name;

/* --- taking one side --- */

static int done(PyObject *result)
{
    Py_XDECREF(result);
    return result == NULL ? -1 : 0;
}

/* The side that raised is booked as such; -1 with an exception set that is no fault of the side's. */
static int broken(listening_object *mine, PyObject *sides, PyObject *direction)
{
    PyObject *type, *error, *trace;
    if (!PyErr_ExceptionMatches(PyExc_Exception))
        return -1;
    PyErr_Fetch(&type, &error, &trace);
    PyErr_NormalizeException(&type, &error, &trace);
    int failed = done(PyObject_CallMethodObjArgs(mine->collector, broken_name, sides, direction, error, NULL));
    Py_XDECREF(type);
    Py_XDECREF(error);
    Py_XDECREF(trace);
    return failed;
}

static int must_look(const walker_object *walker)
{
    return walker->full != NULL && PyList_Size(walker->full) > 0;
}

static int has_sides(PyObject *known)
{
    if (known != NULL && PyDict_Check(known))
        return 1;
    PyErr_SetString(PyExc_TypeError, "a call without its sides");
    return 0;
}

static int take_inputs(listening_object *mine, PyObject *sides, PyObject *args, PyObject *kwargs)
{
    walker_object *walker = (walker_object *)mine->walker;
    walker->leaving = 0;
    sides_object *call = (sides_object *)sides;
    PyObject *unknown = has_sides(call->inputs)
                            ? tlcore_take_arguments(walker, &call->given, call->inputs, args, kwargs)
                            : NULL;
    if (unknown == Py_None && !must_look(walker))
        return done(unknown);
    int failed = unknown == NULL || done(PyObject_CallMethodObjArgs(mine->collector, arguments_name, sides, unknown,
                                                                    kwargs, NULL));
    Py_XDECREF(unknown);
    return failed ? broken(mine, sides, inputs_word) : 0;
}

static int take_output(listening_object *mine, PyObject *sides, PyObject *output)
{
    walker_object *walker = (walker_object *)mine->walker;
    walker->leaving = 1;
    sides_object *call = (sides_object *)sides;
    PyObject *unknown =
        has_sides(call->outputs) ? tlcore_take_result(walker, &call->returned, call->outputs, output) : NULL;
    if (unknown == Py_None && !must_look(walker))
        return done(unknown);
    int failed = unknown == NULL ||
                 done(PyObject_CallMethodObjArgs(mine->collector, result_name, sides, unknown, NULL));
    Py_XDECREF(unknown);
    return failed ? broken(mine, sides, outputs_word) : 0;
}

/* --- one call --- */

static PyObject *pass_on(PyObject *original, PyObject *args, PyObject *kwargs)
{
    return PyObject_Call(original, args, PyDict_Size(kwargs) ? kwargs : NULL);
}

/* The sides of the call that begins, or None where it is not wanted; NULL with an exception set. */
static PyObject *next_call(listening_object *mine, PyObject *listener)
{
    Py_ssize_t call = mine->count++;
    if (call >= 0 && call < PyList_Size(mine->sites))
        return Py_NewRef(PyList_GetItem(mine->sites, call));
    return PyObject_CallMethodObjArgs(listener, new_call_name, NULL);
}

/* Whether the thread is in a backward, which calls modules to compute once more; -1 with an exception set. */
static int in_backward(void)
{
    PyObject *which = backward == NULL ? NULL : PyObject_CallNoArgs(backward);
    if (which == NULL)
        return PyErr_Occurred() ? -1 : 0;
    long number = PyLong_AsLong(which);
    Py_DECREF(which);
    if (number == -1 && PyErr_Occurred())
        return -1;
    return number >= 0;
}

/* Whether the module's class gives it another function than it gave: others may exchange that for all modules at once. */
static int is_exchanged(const listening_object *mine)
{
    PyObject *found = PyObject_GetAttr((PyObject *)Py_TYPE(mine->module), forward_key);
    if (found == NULL)
        PyErr_Clear();
    Py_XDECREF(found);
    return found != mine->given;
}

/* Whether a call of a function is true; -1 with an exception set. */
static int says(PyObject *function)
{
    PyObject *answer = PyObject_CallNoArgs(function);
    int yes = answer == NULL ? -1 : PyObject_IsTrue(answer);
    Py_XDECREF(answer);
    return yes;
}

/* Whether the call is only traced, as the listener says where anything may mean that; -1 with an exception set. */
static int is_traced(PyObject *listener)
{
    if (tracing == NULL)
        return 0;
    int maybe = says(tracing);
    if (maybe == 0)
        maybe = says(modes);
    if (maybe == 0)
        maybe = PyDict_GetItemWithError(flags, flag) == Py_True;
    if (maybe <= 0)
        return maybe;
    PyObject *answer = PyObject_CallMethodObjArgs(listener, traced_name, NULL);
    int yes = answer == NULL ? -1 : PyObject_IsTrue(answer);
    Py_XDECREF(answer);
    return yes;
}

/* Notes whether others have put something around the listener within the step; -1 with an exception set. */
static int look_around(listening_object *mine, PyObject *listener)
{
    PyObject *found = PyDict_GetItemWithError(mine->own, forward_key);
    if (found == listener)
        return 0;
    PyErr_Clear();
    PyObject *answer = PyObject_CallMethodObjArgs(listener, covered_name, NULL);
    int covered = answer == NULL ? -1 : PyObject_IsTrue(answer);
    Py_XDECREF(answer);
    if (covered > 0)
        mine->covered = 1;
    return covered < 0 ? -1 : 0;
}

static int hooked(const listening_object *mine)
{
    if (global_hooks != NULL && PyDict_Size(global_hooks) > 0)
        return 1;
    PyObject *hooks = PyDict_GetItemWithError(mine->own, hooks_key);
    if (hooks == NULL)
        PyErr_Clear();
    return hooks != NULL && PyObject_Size(hooks) != 0;
}

/* What the call has raised is noted, and is what still is raised. */
static void note_raised(PyObject *listener, PyObject *sides, PyObject *args, PyObject *kwargs)
{
    PyObject *type, *error, *trace;
    PyErr_Fetch(&type, &error, &trace);
    PyErr_NormalizeException(&type, &error, &trace);
    if (error != NULL && trace != NULL)
        PyException_SetTraceback(error, trace);
    if (done(PyObject_CallMethodObjArgs(listener, raised_name, sides, error, args, kwargs, NULL))) {
        Py_XDECREF(type);
        Py_XDECREF(error);
        Py_XDECREF(trace);
    } else {
        PyErr_Restore(type, error, trace);
    }
}

static int note_returned(listening_object *mine, PyObject *listener, PyObject *sides, PyObject *args,
                         PyObject *kwargs, PyObject *output)
{
    if (hooked(mine)) {
        PyObject *later = PyObject_CallMethodObjArgs(listener, behind_name, sides, args, kwargs, NULL);
        int comes_later = later == NULL ? -1 : PyObject_IsTrue(later);
        Py_XDECREF(later);
        if (comes_later)
            return comes_later < 0 ? -1 : 0;
    }
    if (take_output(mine, sides, output))
        return -1;
    return mine->post ? done(PyObject_CallMethodObjArgs(mine->collector, post_name, sides, args, kwargs, NULL)) : 0;
}

static PyObject *heard(listening_object *mine, hearing_object *hearing, PyObject *listener, PyObject *sides,
                       PyObject *original, PyObject *args, PyObject *kwargs)
{
    if (look_around(mine, listener) || take_inputs(mine, sides, args, kwargs))
        return NULL;
    PyObject *output = pass_on(original, args, kwargs);
    /* The step may have ended inside the call. */
    if (output == NULL && hearing->owner)
        note_raised(listener, sides, args, kwargs);
    else if (output != NULL && hearing->owner && note_returned(mine, listener, sides, args, kwargs, output))
        Py_CLEAR(output);
    return output;
}

static PyObject *hear(PyObject *self, PyObject *const *given, Py_ssize_t count)
{
    listening_object *mine = (listening_object *)self;
    if (count != 3 || !PyTuple_CheckExact(given[1]) || !PyDict_CheckExact(given[2]))
        return PyErr_Format(PyExc_TypeError, "hear(listener, args, kwargs)");
    if (mine->original == NULL)
        return PyErr_Format(PyExc_RuntimeError, "call aim() first");
    PyObject *listener = given[0], *args = given[1], *kwargs = given[2], *output = NULL, *sides;
    if (mine->given != NULL && is_exchanged(mine) && done(PyObject_CallMethodObjArgs(listener, anew_name, NULL)))
        return NULL;
    PyObject *original = Py_NewRef(mine->original), *held = Py_NewRef(mine->hearing);
    hearing_object *hearing = (hearing_object *)held;
    int ours = PyThread_get_thread_ident() == hearing->owner;
    int recomputed = hearing->owner ? in_backward() : 0;
    int traced = ours && !recomputed ? is_traced(listener) : 0;
    if (recomputed < 0 || traced < 0) {
        output = NULL;
    } else if (!ours || recomputed || traced) {
        mine->elsewhere += hearing->owner && !ours && !recomputed;
        output = pass_on(original, args, kwargs);
    } else if ((sides = next_call(mine, listener)) != NULL) {
        Py_ssize_t before = mine->running;
        mine->running = mine->count - 1;
        if (PyType_IsSubtype(Py_TYPE(sides), sides_type) && tlcore_is_walker(mine->walker))
            output = heard(mine, hearing, listener, sides, original, args, kwargs);
        else
            output = pass_on(original, args, kwargs);
        mine->running = before;
        Py_DECREF(sides);
    }
    Py_DECREF(original);
    Py_DECREF(held);
    return output;
}

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
    PyObject *found = PyDict_GetItemWithError(one->own, forward_key);
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
    return PyDict_SetItem(one->own, forward_key, listener) ? -1 : 1;
}

static int take_one(listening_object *one, PyObject *listener)
{
    if (one->covered || one->replaced != Py_None || !is_there(one, listener) || PyList_Size(one->handles) != 0)
        return PyErr_Occurred() ? -1 : 0;
    return PyDict_DelItem(one->own, forward_key) ? -1 : 1;
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
        if (mine->given != NULL && is_exchanged(mine))
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
    {"hear", (PyCFunction)(void (*)(void))hear, METH_FASTCALL, "One call of what it stands for."},
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

static PyObject *use_torch(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *hooks, *which, *is_tracing, *count, *found, *key;
    if (!PyArg_ParseTuple(args, "O!OOOO!U:use_torch", &PyDict_Type, &hooks, &which, &is_tracing, &count, &PyDict_Type,
                          &found, &key))
        return NULL;
    tlcore_set(&global_hooks, hooks);
    tlcore_set(&backward, which);
    tlcore_set(&tracing, is_tracing);
    tlcore_set(&modes, count);
    tlcore_set(&flags, found);
    tlcore_set(&flag, key);
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"use_torch", use_torch, METH_VARARGS,
     "The dictionary of the hooks that all modules have; what says in which backward a thread is, -1 for none; what says "
     "whether it traces, and how many dispatch modes it is in; a dictionary, and its key of another tracer's flag."},
    {"put_all", put_all, METH_VARARGS, "Put listeners in their places, up to the first unusual one."},
    {"take_all", take_all, METH_VARARGS, "Take listeners away, up to the first unusual one."},
    {NULL, NULL, 0, NULL},
};

static int make_names(void)
{
    const struct {
        PyObject **place;
        const char *text;
    } all[] = {
        {&forward_key, "forward"},      {&hooks_key, "_forward_hooks"},   {&inputs_word, "inputs"},
        {&outputs_word, "outputs"},     {&new_call_name, "_new_call"},     {&raised_name, "_raised"},
        {&behind_name, "_hear_behind_hooks"}, {&arguments_name, "end_inputs"}, {&result_name, "end_outputs"},
        {&broken_name, "broken"},       {&post_name, "post_fwd_inputs"}, {&covered_name, "_is_covered"},
        {&traced_name, "_is_traced_now"}, {&anew_name, "_aim_anew"},
        {&self_name, "__self__"},       {&function_name, "__func__"},
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if ((*all[i].place = PyUnicode_InternFromString(all[i].text)) == NULL)
            return -1;
    return 0;
}

int tlcore_add_listening(PyObject *module)
{
    if (make_names() || PyModule_AddFunctions(module, functions))
        return -1;
    hearing_type = (PyTypeObject *)PyType_FromSpec(&hearing_spec);
    sides_type = (PyTypeObject *)PyType_FromSpec(&sides_spec);
    listening_type = (PyTypeObject *)PyType_FromSpec(&listening_spec);
    if (hearing_type == NULL || sides_type == NULL || listening_type == NULL)
        return -1;
    return PyModule_AddObjectRef(module, "Hearing", (PyObject *)hearing_type) ||
                   PyModule_AddObjectRef(module, "KnownSides", (PyObject *)sides_type) ||
                   PyModule_AddObjectRef(module, "Listening", (PyObject *)listening_type)
               ? -1
               : 0;
}
