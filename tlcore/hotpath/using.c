/* A use of an operator that is what it was at the same place of the call in the step before.
 *
 * The twin is `Operators._takes_again`, with what that calls. Whatever is not as it was is left to Python.
 */
#include "using.h"

#include "looking.h"

static PyTypeObject *using_type, *frame_type;
static PyObject *running_name, *uses_name, *known_name, *codes_name, *own_name, *recall_name, *count_name;
static PyObject *planned_name, *code_name, *last_name, *back_name, *rows_name, *call_name, *tapped_name, *end_name;
static PyObject *broken_name, *inference_name;

/* --- whose code calls --- */

/* Whether the table has an entry for the object's identity; -1 with an exception set. */
static int has(PyObject *table, void *object)
{
    PyObject *key = PyLong_FromVoidPtr(object);
    int found = key == NULL ? -1 : PyDict_Contains(table, key);
    Py_XDECREF(key);
    return found;
}

static int asked(PyObject *running, PyObject *frame, PyObject *functions)
{
    PyObject *answer = PyObject_CallMethodObjArgs(running, own_name, frame, functions, NULL);
    int yes = answer == NULL ? -1 : PyObject_IsTrue(answer);
    Py_XDECREF(answer);
    return yes;
}

/* Whether a frame is of the module's own code, or of plain functions that this has called; -1: an exception is set. */
static int is_own(using_object *mine, PyObject *running, PyObject *codes, PyObject *frame)
{
    int own = 0;
    PyObject *at = Py_NewRef(frame);
    while (!own && at != Py_None) {
        PyCodeObject *code = PyFrame_GetCode((PyFrameObject *)at);
        own = has(codes, code);
        int function = own ? 1 : has(mine->functions, code);
        Py_DECREF(code);
        if (own)
            break;
        if (function <= 0) {
            own = function < 0 ? -1 : asked(running, at, mine->functions);
            break;
        }
        PyObject *back = PyObject_GetAttr(at, back_name);
        Py_DECREF(at);
        at = back;
        if (at == NULL)
            return -1;
    }
    Py_DECREF(at);
    return own;
}

static int has_code(PyObject *frame, PyObject *planned)
{
    PyCodeObject *code = PyFrame_GetCode((PyFrameObject *)frame);
    int same = (PyObject *)code == PyTuple_GetItem(planned, USE_CODE);
    Py_DECREF(code);
    return same;
}

/* The frame that has the planned code, behind those by which torch hands a function around: a new reference. NULL with
 * no exception set where there is none. */
static PyObject *line_of(using_object *mine, PyObject *frame, PyObject *planned)
{
    if (has_code(frame, planned))
        return Py_NewRef(frame);
    PyObject *own = PyObject_GetAttr(PyTuple_GetItem(planned, USE_FUNCTION), code_name);
    PyObject *at = own == NULL ? NULL : PyObject_CallFunctionObjArgs(mine->line_of, frame, own, NULL);
    Py_XDECREF(own);
    if (at == NULL || at == Py_None) {
        Py_XDECREF(at);
        return NULL;
    }
    if (Py_TYPE(at) != frame_type || !has_code(at, planned))
        Py_CLEAR(at);
    return at;
}

static int is_at(PyObject *frame, PyObject *instruction)
{
    PyObject *last = PyObject_GetAttr(frame, last_name);
    int same = last == NULL ? -1 : PyObject_RichCompareBool(last, instruction, Py_EQ);
    Py_XDECREF(last);
    return same;
}

/* --- what has been used --- */

static PyObject *uses_of(using_object *mine, PyObject *running, PyObject *frame, int *own)
{
    PyObject *known = PyObject_GetAttr(running, known_name), *codes = NULL;
    int is_known = known == NULL ? -1 : PyObject_IsTrue(known);
    Py_XDECREF(known);
    if (is_known == 0 && (codes = PyObject_GetAttr(running, codes_name)) != NULL && PyDict_Check(codes) &&
        PyDict_Size(codes) > 0 && (*own = is_own(mine, running, codes, frame)) > 0) {
        PyObject *done = PyObject_CallMethodObjArgs(mine->operators, recall_name, running, NULL);
        if (done == NULL)
            *own = -1;
        Py_XDECREF(done);
    }
    Py_XDECREF(codes);
    return is_known < 0 || PyErr_Occurred() ? NULL : PyObject_GetAttr(running, uses_name);
}

/* What is planned for the next use, a new reference, and which that is. NULL with no exception set for nothing. */
static PyObject *next_of(PyObject *uses, Py_ssize_t *count)
{
    PyObject *number = PyObject_GetAttr(uses, count_name), *found = NULL;
    PyObject *planned = number == NULL ? NULL : PyObject_GetAttr(uses, planned_name);
    *count = number == NULL ? -1 : PyLong_AsSsize_t(number);
    if (planned != NULL && PyList_Check(planned) && *count >= 0 && *count < PyList_Size(planned)) {
        PyObject *each = PyList_GetItem(planned, *count);
        if (PyTuple_Check(each) && PyTuple_Size(each) == USE_PARTS)
            found = Py_NewRef(each);
    }
    Py_XDECREF(number);
    Py_XDECREF(planned);
    return found;
}

/* Whether a call of the planned function comes from the same line with the same inputs; -1 with an exception set. */
static int is_used_again(using_object *mine, PyObject *planned, PyObject *at, PyObject *args, PyObject *kwargs)
{
    int same = is_at(at, PyTuple_GetItem(planned, USE_INSTRUCTION));
    if (same > 0)
        same = tlcore_are_still(mine, args, PyTuple_GetItem(planned, USE_ARGS), PyTuple_GetItem(planned, USE_INPUTS));
    if (same > 0)
        same = tlcore_keywords_are_still(mine, kwargs, planned);
    return same;
}

/* --- taking it --- */

static int set_number(PyObject *object, PyObject *name, Py_ssize_t value)
{
    PyObject *number = PyLong_FromSsize_t(value);
    int failed = number == NULL || PyObject_SetAttr(object, name, number);
    Py_XDECREF(number);
    return failed ? -1 : 0;
}

/* From now on a tensor is what stands at this place; how often it was changed in place is -1 where nobody counts. */
static int note(using_object *mine, PyObject *tensor, PyObject *place)
{
    PyObject *uncounted = PyObject_CallMethodObjArgs(tensor, inference_name, NULL);
    int counts = uncounted == NULL ? -1 : !PyObject_IsTrue(uncounted);
    Py_XDECREF(uncounted);
    if (counts < 0)
        return -1;
    PyObject *version = counts ? PyObject_GetAttr(tensor, tlcore_version_name) : PyLong_FromLong(-1);
    PyObject *held = version == NULL ? NULL : PyWeakref_NewRef(tensor, NULL);
    PyObject *entry = held == NULL ? NULL : PyTuple_Pack(3, held, place, version);
    PyObject *key = entry == NULL ? NULL : PyLong_FromVoidPtr(tensor);
    int failed = key == NULL || PyDict_SetItem(mine->known, key, entry);
    Py_XDECREF(version);
    Py_XDECREF(held);
    Py_XDECREF(entry);
    Py_XDECREF(key);
    return failed ? -1 : 0;
}

static int done(PyObject *result)
{
    Py_XDECREF(result);
    return result == NULL ? -1 : 0;
}

/* What went wrong while a value was taken is booked as such; -1 with an exception set that is no fault of the value's. */
static int broken(using_object *mine, PyObject *call, PyObject *planned)
{
    PyObject *type, *error, *trace;
    if (!PyErr_ExceptionMatches(PyExc_Exception))
        return -1;
    PyErr_Fetch(&type, &error, &trace);
    PyErr_NormalizeException(&type, &error, &trace);
    int failed = done(PyObject_CallMethodObjArgs(mine->collector, broken_name, call,
                                                 PyTuple_GetItem(planned, USE_DIRECTION), error, NULL));
    Py_XDECREF(type);
    Py_XDECREF(error);
    Py_XDECREF(trace);
    return failed;
}

static int take_value(using_object *mine, PyObject *call, PyObject *planned, PyObject *value)
{
    walker_object *walker = (walker_object *)mine->walker;
    PyObject *rows = PyObject_GetAttr(mine->collector, rows_name);
    int all_rows = rows == Py_None;
    Py_XDECREF(rows);
    if (rows == NULL)
        return -1;
    PyObject *known = PyTuple_GetItem(planned, USE_KNOWN), *make = PyTuple_GetItem(planned, USE_MAKE);
    if (!all_rows || !PyDict_Check(known) || !tlcore_is_walker(mine->walker))
        return done(PyObject_CallMethodObjArgs(mine->collector, tapped_name, call,
                                               PyTuple_GetItem(planned, USE_DIRECTION), known, value, make, NULL));
    walker->leaving = 1;
    PyObject *unknown = tlcore_take_result(walker, NULL, known, value);
    int failed = unknown == NULL;
    if (!failed && !(unknown == Py_None && (walker->full == NULL || PyList_Size(walker->full) == 0)))
        failed = done(PyObject_CallMethodObjArgs(mine->collector, end_name, unknown, make, NULL));
    Py_XDECREF(unknown);
    return failed ? broken(mine, call, planned) : 0;
}

static int take(using_object *mine, PyObject *uses, Py_ssize_t count, PyObject *planned, PyObject *value)
{
    PyObject *call = NULL;
    int failed = set_number(uses, count_name, count + 1) || note(mine, value, PyTuple_GetItem(planned, USE_PLACE)) ||
                 (call = PyObject_GetAttr(uses, call_name)) == NULL || take_value(mine, call, planned, value);
    Py_XDECREF(call);
    return failed ? -1 : 1;
}

static int own_code(using_object *mine, PyObject *running, PyObject *at)
{
    PyObject *codes = PyObject_GetAttr(running, codes_name);
    int own = codes == NULL || !PyDict_Check(codes) ? -1 : is_own(mine, running, codes, at);
    Py_XDECREF(codes);
    return own;
}

/* 1 where the use was taken, 0 where it is not one that is known, -1 with an exception set. */
static int taken_of(using_object *mine, PyObject *running, PyObject *const *given)
{
    PyObject *func = given[0], *args = given[1], *kwargs = given[2], *result = given[3], *frame = given[4];
    int own = 0, taken = 0;
    Py_ssize_t count = 0;
    PyObject *uses = uses_of(mine, running, frame, &own);
    if (uses == NULL || own < 0) {
        Py_XDECREF(uses);
        return -1;
    }
    PyObject *planned = uses == Py_None || !tlcore_is_some_tensor(result) ? NULL : next_of(uses, &count);
    if (planned != NULL && PyTuple_GetItem(planned, USE_FUNC) == func) {
        PyObject *at = line_of(mine, frame, planned);
        if (at != NULL && (taken = is_used_again(mine, planned, at, args, kwargs)) > 0 && !(own && at == frame))
            taken = own_code(mine, running, at);
        if (taken > 0)
            taken = take(mine, uses, count, planned, result);
        Py_XDECREF(at);
    }
    Py_XDECREF(planned);
    Py_DECREF(uses);
    return taken < 0 || PyErr_Occurred() ? -1 : taken;
}

static PyObject *again(PyObject *self, PyObject *const *given, Py_ssize_t count)
{
    using_object *mine = (using_object *)self;
    if (count != 5 || !PyTuple_Check(given[1]) || !PyDict_Check(given[2]))
        return PyErr_Format(PyExc_TypeError, "again(func, args, kwargs, result, frame)");
    if (mine->line_of == NULL)
        return PyErr_Format(PyExc_RuntimeError, "make it anew");
    if (PyDict_Size(mine->raw) > 0 || Py_TYPE(given[4]) != frame_type)
        Py_RETURN_FALSE;
    PyObject *running = PyObject_GetAttr(mine->operators, running_name);
    int taken = running == NULL ? -1 : running == Py_None ? 0 : taken_of(mine, running, given);
    Py_XDECREF(running);
    return taken < 0 ? NULL : PyBool_FromLong(taken);
}

static PyObject *knows(PyObject *self, PyObject *value)
{
    using_object *mine = (using_object *)self;
    if (mine->line_of == NULL)
        return PyErr_Format(PyExc_RuntimeError, "make it anew");
    int known = tlcore_knows(mine, value);
    return known < 0 ? NULL : PyBool_FromLong(known);
}

/* --- the type --- */

static int using_init(PyObject *self, PyObject *args, PyObject *kwargs)
{
    using_object *mine = (using_object *)self;
    static char *names[] = {"walker", "operators", "collector", "known", "raw", "functions", "of", "ask", "line_of", NULL};
    PyObject *walker, *operators, *collector, *known, *raw, *functions, *of, *ask, *line;
    if (!PyArg_ParseTupleAndKeywords(args, kwargs, "OOOO!O!O!OOO:Using", names, &walker, &operators, &collector,
                                     &PyDict_Type, &known, &PyDict_Type, &raw, &PyDict_Type, &functions, &of, &ask, &line))
        return -1;
    if (PyEval_GetFrame() != NULL)
        frame_type = Py_TYPE(PyEval_GetFrame());
    tlcore_set(&mine->walker, walker);
    tlcore_set(&mine->operators, operators);
    tlcore_set(&mine->collector, collector);
    tlcore_set(&mine->known, known);
    tlcore_set(&mine->raw, raw);
    tlcore_set(&mine->functions, functions);
    tlcore_set(&mine->of, of);
    tlcore_set(&mine->ask, ask);
    return tlcore_set(&mine->line_of, line);
}

static int using_traverse(PyObject *self, visitproc visit, void *arg)
{
    using_object *mine = (using_object *)self;
    Py_VISIT(Py_TYPE(self));
    for (int i = 0; i < USING_HOLDS; i++)
        Py_VISIT(mine->held[i]);
    return 0;
}

static int using_clear(PyObject *self)
{
    using_object *mine = (using_object *)self;
    for (int i = 0; i < USING_HOLDS; i++)
        Py_CLEAR(mine->held[i]);
    return 0;
}

static void using_free(PyObject *self)
{
    PyTypeObject *type = Py_TYPE(self);
    PyObject_GC_UnTrack(self);
    using_clear(self);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static PyMethodDef using_methods[] = {
    {"again", (PyCFunction)(void (*)(void))again, METH_FASTCALL,
     "Take a use of a function of torch (func, args, kwargs, result, frame) that is what was planned; False for any other."},
    {"knows", knows, METH_O, "Whether a value certainly has no tensor that is not known."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot using_slots[] = {
    {Py_tp_new, PyType_GenericNew},       {Py_tp_init, using_init},   {Py_tp_dealloc, using_free},
    {Py_tp_traverse, using_traverse},     {Py_tp_clear, using_clear}, {Py_tp_methods, using_methods},
    {0, NULL},
};

static PyType_Spec using_spec = {
    .name = "tlcore.hotpath._native.Using",
    .basicsize = sizeof(using_object),
    .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_GC,
    .slots = using_slots,
};

static int make_names(void)
{
    const struct {
        PyObject **place;
        const char *text;
    } all[] = {
        {&running_name, "running"}, {&uses_name, "uses"},         {&known_name, "known"},    {&codes_name, "codes"},
        {&own_name, "is_own"},      {&recall_name, "_recall"},    {&count_name, "count"},    {&planned_name, "planned"},
        {&code_name, "code"},       {&last_name, "f_lasti"},      {&back_name, "f_back"},    {&rows_name, "_rows"},
        {&call_name, "call"},       {&tapped_name, "tapped"},     {&end_name, "end_tapped"}, {&broken_name, "broken"},
        {&inference_name, "is_inference"},
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if ((*all[i].place = PyUnicode_InternFromString(all[i].text)) == NULL)
            return -1;
    return tlcore_make_operand_words();
}

int tlcore_add_using(PyObject *module)
{
    if (make_names())
        return -1;
    using_type = (PyTypeObject *)PyType_FromSpec(&using_spec);
    return using_type == NULL ? -1 : PyModule_AddObjectRef(module, "Using", (PyObject *)using_type);
}
