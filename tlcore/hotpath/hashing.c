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

static void put_digest(digest_words words, unsigned char *digest)
{
    for (int i = 0; i < 8; i++) {
        digest[i] = (unsigned char)(words.high >> (56 - 8 * i));
        digest[8 + i] = (unsigned char)(words.low >> (56 - 8 * i));
    }
}

void tlcore_digest(const void *data, size_t size, unsigned char *digest)
{
    put_digest(xxh3_128(size ? data : "", size), digest);
}

/* The library's functions for what comes piece by piece, in the order in which `use_xxh3_pieces` takes them. */
static struct {
    void *(*create)(void);
    int (*release)(void *);
    int (*reset)(void *);
    int (*update)(void *, const void *, size_t);
    digest_words (*digest)(const void *);
} pieces;

int tlcore_hashes_pieces(void)
{
    return pieces.create != NULL;
}

void *tlcore_hash_new(void)
{
    return pieces.create();
}

void tlcore_hash_begin(void *state)
{
    pieces.reset(state);
}

void tlcore_hash_more(void *state, const void *data, size_t size)
{
    if (size)
        pieces.update(state, data, size);
}

void tlcore_hash_end(void *state, unsigned char *digest)
{
    put_digest(pieces.digest(state), digest);
}

void tlcore_hash_free(void *state)
{
    pieces.release(state);
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

static PyObject *use_xxh3_pieces(PyObject *module, PyObject *args)
{
    (void)module;
    unsigned long long create, release, reset, update, digest;
    if (!PyArg_ParseTuple(args, "KKKKK:use_xxh3_pieces", &create, &release, &reset, &update, &digest))
        return NULL;
    pieces.create = (void *(*)(void))(uintptr_t)create;
    pieces.release = (int (*)(void *))(uintptr_t)release;
    pieces.reset = (int (*)(void *))(uintptr_t)reset;
    pieces.update = (int (*)(void *, const void *, size_t))(uintptr_t)update;
    pieces.digest = (digest_words(*)(const void *))(uintptr_t)digest;
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

static PyObject *digest_in_pieces(PyObject *module, PyObject *parts)
{
    (void)module;
    unsigned char digest[TLCORE_DIGEST_BYTES];
    void *state = tlcore_hashes_pieces() && PyTuple_Check(parts) ? tlcore_hash_new() : NULL;
    if (state == NULL)
        return PyErr_Format(PyExc_RuntimeError, "no hash functions have been given to the extension, or no tuple");
    tlcore_hash_begin(state);
    for (Py_ssize_t i = 0; i < PyTuple_Size(parts) && !PyErr_Occurred(); i++) {
        char *data;
        Py_ssize_t size;
        if (PyBytes_AsStringAndSize(PyTuple_GetItem(parts, i), &data, &size) == 0)
            tlcore_hash_more(state, data, (size_t)size);
    }
    tlcore_hash_end(state, digest);
    tlcore_hash_free(state);
    return PyErr_Occurred() ? NULL : PyBytes_FromStringAndSize((const char *)digest, sizeof digest);
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
    {"use_xxh3_pieces", use_xxh3_pieces, METH_VARARGS,
     "Hash what comes in pieces with XXH3_createState, XXH3_freeState, XXH3_128bits_reset, _update, _digest."},
    {"digest_in_pieces", digest_in_pieces, METH_O, "The XXH3-128 of the parts of a tuple together."},
    {"hex_digests", hex_digests, METH_O, "The XXH3-128 of each buffer in hex."},
    {NULL, NULL, 0, NULL},
};

int tlcore_add_hashing(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
