/* What stands in base64 in a text, where all else of it is as in another text. */
#include "native.h"

#include <stdlib.h>
#include <string.h>

#define NONE 0xFF
#define PADDING '='
#define MOST_PADDING 2

typedef struct {
    int64_t begin, end;
} span;

static unsigned char values[256];

static void fill_values(void)
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    memset(values, NONE, sizeof values);
    for (unsigned char i = 0; i < 64; i++)
        values[(unsigned char)digits[i]] = i;
}

/* How many bytes a span of digits holds; `pattern` says where it ends in padding. */
static size_t decoded(span one, const unsigned char *pattern, size_t *padding)
{
    size_t size = (size_t)(one.end - one.begin);
    *padding = 0;
    while (*padding < MOST_PADDING && *padding < size && pattern[one.end - 1 - (int64_t)*padding] == PADDING)
        ++*padding;
    return size / 4 * 3 - *padding;
}

/* Where the next bytes go; NULL where these are no digits, or not those that the bytes would be written with. */
static unsigned char *decode(const unsigned char *digits, size_t size, size_t padding, unsigned char *target)
{
    for (size_t at = 0; at < size; at += 4) {
        size_t left = at + 4 < size ? 0 : padding, whole = 4 - left;
        uint32_t word = 0;
        unsigned char wrong = 0;
        for (size_t i = 0; i < 4; i++) {
            unsigned char value = i < whole ? values[digits[at + i]] : 0;
            wrong |= i < whole ? value & 0x80 : (unsigned char)(digits[at + i] != PADDING);
            word = word << 6 | value;
        }
        if (wrong || (word & ((1u << 8 * left) - 1)))
            return NULL;
        for (size_t i = 0; i < 3 - left; i++)
            *target++ = (unsigned char)(word >> (16 - 8 * i));
    }
    return target;
}

static int decode_all(const unsigned char *text, const unsigned char *pattern, size_t size, const span *spans,
                      Py_ssize_t count, unsigned char *target)
{
    size_t done = 0, padding;
    for (Py_ssize_t i = 0; i < count; i++) {
        size_t begin = (size_t)spans[i].begin, end = (size_t)spans[i].end;
        if (memcmp(text + done, pattern + done, begin - done))
            return 0;
        (void)decoded(spans[i], pattern, &padding);
        target = decode(text + begin, end - begin, padding, target);
        if (target == NULL)
            return 0;
        done = end;
    }
    return !memcmp(text + done, pattern + done, size - done);
}

/* The bytes that all spans hold; -1 with an exception set for spans that make no sense. */
static Py_ssize_t check_spans(const span *spans, Py_ssize_t count, const Py_buffer *pattern)
{
    Py_ssize_t total = 0;
    int64_t done = 0;
    size_t padding;
    for (Py_ssize_t i = 0; i < count; i++) {
        span one = spans[i];
        if (one.begin < done || one.end < one.begin || one.end > pattern->len || (one.end - one.begin) % 4) {
            PyErr_Format(PyExc_ValueError, "span %zd: [%lld, %lld) is none of base64 behind %lld in %zd bytes", i,
                         (long long)one.begin, (long long)one.end, (long long)done, pattern->len);
            return -1;
        }
        total += (Py_ssize_t)decoded(one, pattern->buf, &padding);
        done = one.end;
    }
    return total;
}

static PyObject *decode_checked(const Py_buffer *text, const Py_buffer *pattern, const span *spans, Py_ssize_t count)
{
    Py_ssize_t total = check_spans(spans, count, pattern);
    if (total < 0)
        return NULL;
    if (text->len != pattern->len)
        return Py_NewRef(Py_None);
    PyObject *found = PyBytes_FromStringAndSize(NULL, total);
    if (found == NULL)
        return NULL;
    if (decode_all(text->buf, pattern->buf, (size_t)pattern->len, spans, count,
                   (unsigned char *)PyBytes_AsString(found)))
        return found;
    Py_DECREF(found);
    return Py_NewRef(Py_None);
}

static PyObject *decode_spans(PyObject *module, PyObject *args)
{
    (void)module;
    Py_buffer text, pattern, raw;
    PyObject *found = NULL;
    if (!PyArg_ParseTuple(args, "y*y*y*:decode_spans", &text, &pattern, &raw))
        return NULL;
    Py_ssize_t count = raw.len / (Py_ssize_t)sizeof(span);
    /* Copied: they may begin anywhere in memory. */
    span *spans = PyMem_Calloc((size_t)count + 1, sizeof *spans);
    if (spans == NULL)
        PyErr_NoMemory();
    else if (raw.len % (Py_ssize_t)sizeof(span))
        PyErr_SetString(PyExc_ValueError, "spans are pairs of 64-bit integers");
    else {
        if (count)
            memcpy(spans, raw.buf, (size_t)raw.len);
        found = decode_checked(&text, &pattern, spans, count);
    }
    PyMem_Free(spans);
    PyBuffer_Release(&text);
    PyBuffer_Release(&pattern);
    PyBuffer_Release(&raw);
    return found;
}

static PyMethodDef functions[] = {
    {"decode_spans", decode_spans, METH_VARARGS,
     "What spans of a text hold in base64, where all else is as in a pattern; None where it is not."},
    {NULL, NULL, 0, NULL},
};

int tlcore_add_spans(PyObject *module)
{
    fill_values();
    return PyModule_AddFunctions(module, functions);
}
