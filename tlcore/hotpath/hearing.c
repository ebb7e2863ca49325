/* One call of a module that a listener stands in for: what the wanted ones are given and return is taken.
 *
 * Python's part stays in charge: whatever is not the usual case (a structure seen for the first time, hooks of
 * others, an error) is handed to the listener or the collector, and said there.
 */
#include "listening.h"

#include <pythread.h>

PyObject *tlcore_forward_key;
static PyObject *global_hooks, *backward, *tracing, *modes, *flags, *flag;
static PyObject *hooks_key, *inputs_word, *outputs_word;
static PyObject *new_call_name, *raised_name, *behind_name, *arguments_name, *result_name, *broken_name, *post_name;
static PyObject *covered_name, *traced_name, *anew_name;

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

int tlcore_is_exchanged(const listening_object *mine)
{
    PyObject *found = PyObject_GetAttr((PyObject *)Py_TYPE(mine->module), tlcore_forward_key);
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
        maybe = flag == Py_None ? says(flags) : PyDict_GetItemWithError(flags, flag) == Py_True;
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
    PyObject *found = PyDict_GetItemWithError(mine->own, tlcore_forward_key);
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

PyObject *tlcore_hear(PyObject *self, PyObject *const *given, Py_ssize_t count)
{
    listening_object *mine = (listening_object *)self;
    if (count != 3 || !PyTuple_CheckExact(given[1]) || !PyDict_CheckExact(given[2]))
        return PyErr_Format(PyExc_TypeError, "hear(listener, args, kwargs)");
    if (mine->original == NULL)
        return PyErr_Format(PyExc_RuntimeError, "call aim() first");
    PyObject *listener = given[0], *args = given[1], *kwargs = given[2], *output = NULL, *sides;
    if (mine->given != NULL && tlcore_is_exchanged(mine) && done(PyObject_CallMethodObjArgs(listener, anew_name, NULL)))
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
        if (PyType_IsSubtype(Py_TYPE(sides), tlcore_sides_type) && tlcore_is_walker(mine->walker))
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

/* --- what is asked of torch --- */

static PyObject *use_torch(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *hooks, *which, *is_tracing, *count, *found, *key;
    if (!PyArg_ParseTuple(args, "O!OOOOO:use_torch", &PyDict_Type, &hooks, &which, &is_tracing, &count, &found, &key))
        return NULL;
    if (key != Py_None && !(PyDict_Check(found) && PyUnicode_Check(key))) {
        PyErr_SetString(PyExc_TypeError, "a flag has a dictionary and a key that is a text");
        return NULL;
    }
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
     "whether it traces, and how many dispatch modes it is in; a dictionary, and its key of another tracer's flag, or what "
     "says whether that traces, and None."},
    {NULL, NULL, 0, NULL},
};

static int make_names(void)
{
    const struct {
        PyObject **place;
        const char *text;
    } all[] = {
        {&tlcore_forward_key, "forward"},      {&hooks_key, "_forward_hooks"},   {&inputs_word, "inputs"},
        {&outputs_word, "outputs"},     {&new_call_name, "_new_call"},     {&raised_name, "_raised"},
        {&behind_name, "_hear_behind_hooks"}, {&arguments_name, "end_inputs"}, {&result_name, "end_outputs"},
        {&broken_name, "broken"},       {&post_name, "post_fwd_inputs"}, {&covered_name, "_is_covered"},
        {&traced_name, "_is_traced_now"}, {&anew_name, "_aim_anew"},
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if ((*all[i].place = PyUnicode_InternFromString(all[i].text)) == NULL)
            return -1;
    return 0;
}

int tlcore_add_hearing(PyObject *module)
{
    return make_names() || PyModule_AddFunctions(module, functions) ? -1 : 0;
}
