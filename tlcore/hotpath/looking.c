/* Looking at tensors without torch's headers.
 *
 * DLPack's exchange function says where a tensor's bytes lie and how, but not all that matters: negative bits,
 * tensors of zeros that are never written down, and wrappers of torch.func look plain to it. All of these are
 * marked in one word that torch keeps in a tensor's head, a fixed distance behind its shape. `learn` finds that
 * word by comparing tensors that are known to be plain with tensors that are known not to be. Only tensors whose
 * word is that of a plain one are dealt with here; a torch in which no such word is found is left to Python.
 */
#include "looking.h"

#include <string.h>

/* How far behind its shape a tensor's head is looked at: to its end in the torch that this was tried with. */
#define WORDS 14
#define PLAIN_KINDS 4
/* A freed storage leaves an offset for an address. No memory of a 64-bit process lies as low as any offset. */
#define LOWEST_ADDRESS ((uintptr_t)1 << 38)
#define LONGEST_TABLE 4096

static dlpack_look look;
static PyObject *tensor_type;
static PyObject *dtype_name;
static int plain_index = -1;
static uint64_t plain_words[PLAIN_KINDS];
static int plain_count;

int tlcore_can_look(void)
{
    return plain_index >= 0;
}

int tlcore_is_tensor(PyObject *object)
{
    return (PyObject *)Py_TYPE(object) == tensor_type;
}

int tlcore_is_some_tensor(PyObject *object)
{
    return tensor_type != NULL && PyType_IsSubtype(Py_TYPE(object), (PyTypeObject *)tensor_type);
}

static int is_plain_word(uint64_t word)
{
    for (int i = 0; i < plain_count; i++)
        if (plain_words[i] == word)
            return 1;
    return 0;
}

int tlcore_is_contiguous(const dlpack_tensor *view)
{
    int64_t expected = 1;
    for (int i = view->ndim - 1; i >= 0; i--) {
        if (view->shape[i] == 0)
            return 1;
        if (view->shape[i] != 1 && view->strides[i] != expected)
            return 0;
        expected *= view->shape[i];
    }
    return 1;
}

int tlcore_look(PyObject *tensor, dlpack_tensor *view)
{
    if (look(tensor, view)) {
        PyErr_Clear();
        return 0;
    }
    if (view->device_type != DLPACK_CPU || view->byte_offset || view->ndim > TLCORE_DIMENSIONS)
        return 0;
    return is_plain_word((uint64_t)view->shape[plain_index]);
}

/* --- what is known of a dtype and shape --- */

static size_t slot_of(const spec_table *table, const dlpack_tensor *view)
{
    uint64_t hash = ((uint64_t)view->dtype.code << 16 | view->dtype.bits) * 8 + (uint64_t)view->ndim;
    for (int i = 0; i < view->ndim; i++)
        hash = (hash ^ (uint64_t)view->shape[i]) * UINT64_C(0x9E3779B97F4A7C15);
    return (size_t)(hash >> 32) & (table->size - 1);
}

static int is_same(const known_spec *known, const dlpack_tensor *view)
{
    return known->ndim == view->ndim && known->dtype.code == view->dtype.code &&
           known->dtype.bits == view->dtype.bits && known->dtype.lanes == view->dtype.lanes &&
           memcmp(known->shape, view->shape, (size_t)view->ndim * sizeof *view->shape) == 0;
}

/* The slot of a view: with what is known of it, or free. */
static known_spec *probe(const spec_table *table, const dlpack_tensor *view)
{
    size_t slot = slot_of(table, view);
    while (table->slots[slot].spec != NULL && !is_same(&table->slots[slot], view))
        slot = (slot + 1) & (table->size - 1);
    return &table->slots[slot];
}

const known_spec *tlcore_find(const spec_table *table, PyObject *tensor, const dlpack_tensor *view)
{
    if (table->size == 0)
        return NULL;
    const known_spec *known = probe(table, view);
    if (known->spec == NULL)
        return NULL;
    if (known->exact) {
        PyObject *dtype = PyObject_GetAttr(tensor, dtype_name);
        int same = dtype == known->torch_dtype;
        if (dtype == NULL)
            PyErr_Clear();
        Py_XDECREF(dtype);
        if (!same)
            return NULL;
    }
    if (known->nbytes && (uintptr_t)view->data < LOWEST_ADDRESS)
        return NULL;
    return known;
}

static int grow(spec_table *table)
{
    spec_table larger = {NULL, table->size ? 2 * table->size : 64, table->used};
    larger.slots = PyMem_Calloc(larger.size, sizeof *larger.slots);
    if (larger.slots == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    for (size_t i = 0; i < table->size; i++) {
        known_spec *old = &table->slots[i];
        dlpack_tensor view = {.ndim = old->ndim, .dtype = old->dtype, .shape = old->shape};
        if (old->spec != NULL)
            *probe(&larger, &view) = *old;
    }
    PyMem_Free(table->slots);
    *table = larger;
    return 0;
}

/* Whether a copy of the tensor has `nbytes` bytes, so that none can run past its end. */
static int has_bytes(const dlpack_tensor *view, Py_ssize_t nbytes)
{
    Py_ssize_t bytes = (view->dtype.bits * view->dtype.lanes + 7) / 8;
    for (int i = 0; i < view->ndim; i++)
        if (__builtin_mul_overflow(bytes, view->shape[i], &bytes))
            return 0;
    return bytes == nbytes;
}

int tlcore_know(spec_table *table, PyObject *tensor, PyObject *spec, Py_ssize_t nbytes)
{
    dlpack_tensor view;
    if (!tlcore_can_look() || !tlcore_is_tensor(tensor) || !tlcore_look(tensor, &view))
        return 0;
    if (!has_bytes(&view, nbytes) || table->used >= LONGEST_TABLE)
        return 0;
    if (2 * (table->used + 1) > table->size && grow(table))
        return -1;
    known_spec *known = probe(table, &view);
    if (known->spec != NULL)
        return 0;
    PyObject *dtype = PyObject_GetAttr(tensor, dtype_name);
    if (dtype == NULL)
        return -1;
    *known = (known_spec){.dtype = view.dtype, .ndim = view.ndim, .nbytes = nbytes, .torch_dtype = dtype};
    known->exact = view.dtype.bits == 8 && (view.dtype.code == DLPACK_INT || view.dtype.code == DLPACK_UINT);
    known->spec = Py_NewRef(spec);
    memcpy(known->shape, view.shape, (size_t)view.ndim * sizeof *view.shape);
    table->used++;
    return 0;
}

void tlcore_forget(spec_table *table)
{
    spec_table old = *table;
    /* Emptied first: what is let go may run code that looks here. */
    *table = (spec_table){NULL, 0, 0};
    for (size_t i = 0; i < old.size; i++) {
        Py_XDECREF(old.slots[i].spec);
        Py_XDECREF(old.slots[i].torch_dtype);
    }
    PyMem_Free(old.slots);
}

int tlcore_traverse(const spec_table *table, visitproc visit, void *arg)
{
    for (size_t i = 0; i < table->size; i++)
        Py_VISIT(table->slots[i].spec);
    return 0;
}

/* --- finding the word --- */

/* The words behind each tensor's shape; 0 where one cannot be looked at. */
static int words_of(PyObject *tensors, const uint64_t **words, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++) {
        dlpack_tensor view;
        if (look(PyTuple_GetItem(tensors, i), &view)) {
            PyErr_Clear();
            return 0;
        }
        words[i] = (const uint64_t *)view.shape;
    }
    return 1;
}

/* Whether the word at `index` tells plain tensors from odd ones; the plain ones' values are kept then. */
static int tells(const uint64_t **plain, Py_ssize_t plains, const uint64_t **odd, Py_ssize_t odds, int index)
{
    plain_count = 0;
    for (Py_ssize_t i = 0; i < plains; i++) {
        uint64_t word = plain[i][index];
        if (is_plain_word(word))
            continue;
        if (plain_count == PLAIN_KINDS)
            return 0;
        plain_words[plain_count++] = word;
    }
    for (Py_ssize_t i = 0; i < odds; i++)
        if (is_plain_word(odd[i][index]))
            return 0;
    return 1;
}

static int find_word(PyObject *plain, PyObject *odd)
{
    const uint64_t *plain_at[64], *odd_at[64];
    Py_ssize_t plains = PyTuple_Size(plain), odds = PyTuple_Size(odd);
    if (plains < 1 || odds < 1 || plains > 64 || odds > 64)
        return -1;
    if (!words_of(plain, plain_at, plains) || !words_of(odd, odd_at, odds))
        return -1;
    /* The first such word: behind the last one there may be no more head to look at. */
    for (int index = TLCORE_DIMENSIONS; index < WORDS; index++)
        if (tells(plain_at, plains, odd_at, odds, index))
            return index;
    return -1;
}

static PyObject *learn(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *type, *capsule, *plain, *odd;
    if (!PyArg_ParseTuple(args, "OOO!O!:learn", &type, &capsule, &PyTuple_Type, &plain, &PyTuple_Type, &odd))
        return NULL;
    const dlpack_exchange *exchange = PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
    if (exchange == NULL)
        return NULL;
    plain_index = -1;
    if (!PyType_Check(type) || exchange->major != DLPACK_MAJOR || exchange->look == NULL)
        Py_RETURN_FALSE;
    if (dtype_name == NULL && (dtype_name = PyUnicode_InternFromString("dtype")) == NULL)
        return NULL;
    PyObject *before = tensor_type;
    tensor_type = Py_NewRef(type);
    Py_XDECREF(before);
    look = exchange->look;
    plain_index = find_word(plain, odd);
    return PyBool_FromLong(plain_index >= 0);
}

static PyObject *is_plain(PyObject *module, PyObject *tensor)
{
    (void)module;
    dlpack_tensor view;
    return PyBool_FromLong(tlcore_can_look() && tlcore_is_tensor(tensor) && tlcore_look(tensor, &view));
}

static PyMethodDef functions[] = {
    {"learn", learn, METH_VARARGS, "Find out what marks a plain tensor; whether that was possible."},
    {"is_plain", is_plain, METH_O, "Whether a tensor is exactly a torch.Tensor, plain, strided, on the CPU."},
    {NULL, NULL, 0, NULL},
};

int tlcore_add_looking(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
