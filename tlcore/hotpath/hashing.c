/* XXH3-128 of many buffers in one call, without the interpreter's lock. */
#include "native.h"

/* What XXH3_128bits of the xxhash library gives: two words, the low one first. */
typedef struct {
    uint64_t low, high;
} digest_words;
typedef digest_words (*hash_function)(const void *, size_t);

static hash_function xxh3_128;

int tlcore_can_hash(void)
{
    return xxh3_128 != NULL;
}

void tlcore_hex_digest(const void *data, size_t size, char *hex)
{
    static const char digits[] = "0123456789abcdef";
    /* The address of an empty buffer may be NULL, which the library need not take. */
    digest_words words = xxh3_128(size ? data : "", size);
    for (int i = 0; i < 16; i++) {
        hex[15 - i] = digits[(words.high >> (4 * i)) & 15];
        hex[31 - i] = digits[(words.low >> (4 * i)) & 15];
    }
    hex[32] = 0;
}

void tlcore_digest(const void *data, size_t size, unsigned char *digest)
{
    digest_words words = xxh3_128(size ? data : "", size);
    for (int i = 0; i < 8; i++) {
        digest[i] = (unsigned char)(words.high >> (56 - 8 * i));
        digest[8 + i] = (unsigned char)(words.low >> (56 - 8 * i));
    }
}

static PyObject *use_xxh3(PyObject *module, PyObject *address)
{
    (void)module;
    uintptr_t found = (uintptr_t)PyLong_AsUnsignedLongLong(address);
    if (PyErr_Occurred())
        return NULL;
    xxh3_128 = (hash_function)found;
    Py_RETURN_NONE;
}

/* The views of a sequence's items; how many were taken, less than all with an exception set. */
static Py_ssize_t take_views(PyObject *items, Py_buffer *views, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *item = PySequence_GetItem(items, i);
        if (item == NULL)
            return i;
        int failed = PyObject_GetBuffer(item, &views[i], PyBUF_SIMPLE);
        Py_DECREF(item);
        if (failed)
            return i;
    }
    return count;
}

static void hash_all(const Py_buffer *views, Py_ssize_t count, char (*hex)[TLCORE_HEX_CHARS])
{
    for (Py_ssize_t i = 0; i < count; i++)
        tlcore_hex_digest(views[i].buf, (size_t)views[i].len, hex[i]);
}

static PyObject *texts(char (*hex)[TLCORE_HEX_CHARS], Py_ssize_t count)
{
    PyObject *list = PyList_New(count);
    for (Py_ssize_t i = 0; list != NULL && i < count; i++) {
        PyObject *text = PyUnicode_FromStringAndSize(hex[i], TLCORE_HEX_CHARS - 1);
        if (text == NULL)
            Py_CLEAR(list);
        else
            PyList_SetItem(list, i, text);
    }
    return list;
}

static PyObject *hex_digests(PyObject *module, PyObject *buffers)
{
    (void)module;
    if (!tlcore_can_hash())
        return PyErr_Format(PyExc_RuntimeError, "no hash function has been given to the extension");
    /* A list may change while another thread runs; a tuple does not. */
    PyObject *items = PySequence_Tuple(buffers);
    if (items == NULL)
        return NULL;
    Py_ssize_t count = PyTuple_Size(items), taken = 0;
    PyObject *found = NULL;
    Py_buffer *views = PyMem_Calloc((size_t)count + 1, sizeof *views);
    char(*hex)[TLCORE_HEX_CHARS] = PyMem_Calloc((size_t)count + 1, TLCORE_HEX_CHARS);
    if (views == NULL || hex == NULL) {
        PyErr_NoMemory();
    } else if ((taken = take_views(items, views, count)) == count) {
        Py_BEGIN_ALLOW_THREADS;
        hash_all(views, count, hex);
        Py_END_ALLOW_THREADS;
        found = texts(hex, count);
    }
    for (Py_ssize_t i = 0; i < taken; i++)
        PyBuffer_Release(&views[i]);
    PyMem_Free(views);
    PyMem_Free(hex);
    Py_DECREF(items);
    return found;
}

static PyMethodDef functions[] = {
    {"use_xxh3", use_xxh3, METH_O, "Hash with the function XXH3_128bits at this address; 0 for none."},
    {"hex_digests", hex_digests, METH_O, "The XXH3-128 of each buffer in hex."},
    {NULL, NULL, 0, NULL},
};

int tlcore_add_hashing(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
