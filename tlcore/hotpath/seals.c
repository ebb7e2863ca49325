/* The checksums in what is around a payload: filled in, or found to be there, for many at once. */
#include "native.h"

#include <string.h>

/* Where the text is put (or is) in one buffer, where its template lies in another, the data that it is for;
 * then, from the text's begin: where the data's CRC-32 stands (-1: nowhere); a mix of checksums so far, the one
 * that follows the data's in it, and where its twenty digits stand; the range whose CRC-32 stands at `of_range`. */
typedef struct {
    int64_t at, template_at, size, begin, end;
    int64_t of_data[3];
    uint64_t mixed, last;
    int64_t digits, range_begin, range_end, of_range[3];
} seal_row;

typedef unsigned long (*checksum_function)(unsigned long, const unsigned char *, unsigned);
static checksum_function crc32_of;

static uint32_t checksum(const char *data, int64_t size)
{
    unsigned long found = crc32_of(0, NULL, 0);
    while (size > 0) {
        unsigned piece = size > 1 << 30 ? 1 << 30 : (unsigned)size;
        found = crc32_of(found, (const unsigned char *)data, piece);
        data += piece;
        size -= piece;
    }
    return (uint32_t)found;
}

static uint64_t mix(uint64_t seed, uint64_t more)
{
    return seed ^ (more + UINT64_C(0x9E3779B9) + (seed << 6) + (seed >> 2));
}

static void put_number(char *text, uint32_t number)
{
    for (int i = 0; i < 4; i++)
        text[i] = (char)(number >> (8 * i) & 255);
}

static uint32_t number_at(const char *text)
{
    uint32_t found = 0;
    for (int i = 3; i >= 0; i--)
        found = found << 8 | (unsigned char)text[i];
    return found;
}

/* Make the text of a row whose data has this CRC-32. */
static void seal_one(const seal_row *row, const char *templates, uint32_t of_data, char *text)
{
    memcpy(text, templates + row->template_at, (size_t)row->size);
    uint64_t mixed = row->end > row->begin ? mix(row->mixed, of_data) : row->mixed;
    mixed = mix(mixed, row->last);
    for (int i = 19; i >= 0; i--, mixed /= 10)
        text[row->digits + i] = (char)('0' + mixed % 10);
    uint32_t of_range = checksum(text + row->range_begin, row->range_end - row->range_begin);
    for (int i = 0; i < 3; i++)
        if (row->of_data[i] >= 0)
            put_number(text + row->of_data[i], of_data);
    for (int i = 0; i < 3; i++)
        if (row->of_range[i] >= 0)
            put_number(text + row->of_range[i], of_range);
}

static int is_in(int64_t begin, int64_t size, int64_t room)
{
    return begin >= 0 && size >= 0 && size <= room && begin <= room - size;
}

static int fits(const seal_row *row, Py_ssize_t texts, Py_ssize_t templates, Py_ssize_t data)
{
    if (!is_in(row->at, row->size, texts) || !is_in(row->template_at, row->size, templates) || row->begin < 0 ||
        row->end < row->begin || row->end > data || !is_in(row->digits, 20, row->size) ||
        row->range_begin < 0 || row->range_end < row->range_begin ||
        !is_in(row->range_begin, row->range_end - row->range_begin, row->size))
        return 0;
    for (int i = 0; i < 3; i++)
        if ((row->of_data[i] != -1 && !is_in(row->of_data[i], 4, row->size)) ||
            (row->of_range[i] != -1 && !is_in(row->of_range[i], 4, row->size)))
            return 0;
    return 1;
}

/* The rows, checked; NULL with an exception set. A buffer of them may begin anywhere in memory. */
static seal_row *checked_rows(const Py_buffer *raw, Py_ssize_t texts, Py_ssize_t templates, Py_ssize_t data)
{
    Py_ssize_t count = raw->len / (Py_ssize_t)sizeof(seal_row);
    if (crc32_of == NULL)
        return (seal_row *)PyErr_Format(PyExc_RuntimeError, "no checksum function has been given to the extension");
    if (raw->len % (Py_ssize_t)sizeof(seal_row))
        return (seal_row *)PyErr_Format(PyExc_ValueError, "rows of seals have %zd bytes", sizeof(seal_row));
    seal_row *rows = PyMem_Calloc((size_t)count + 1, sizeof *rows);
    if (rows == NULL)
        return (seal_row *)PyErr_NoMemory();
    if (count)
        memcpy(rows, raw->buf, (size_t)raw->len);
    for (Py_ssize_t i = 0; i < count; i++)
        if (!fits(&rows[i], texts, templates, data)) {
            PyErr_Format(PyExc_ValueError, "seal %zd does not fit", i);
            PyMem_Free(rows);
            return NULL;
        }
    return rows;
}

static PyObject *seal(PyObject *module, PyObject *args)
{
    (void)module;
    Py_buffer texts, templates, raw, data;
    if (!PyArg_ParseTuple(args, "w*y*y*y*:seal", &texts, &templates, &raw, &data))
        return NULL;
    seal_row *rows = checked_rows(&raw, texts.len, templates.len, data.len);
    Py_ssize_t count = raw.len / (Py_ssize_t)sizeof *rows;
    if (rows != NULL) {
        Py_BEGIN_ALLOW_THREADS;
        for (Py_ssize_t i = 0; i < count; i++) {
            const seal_row *row = &rows[i];
            uint32_t of_data = checksum((const char *)data.buf + row->begin, row->end - row->begin);
            seal_one(row, templates.buf, of_data, (char *)texts.buf + row->at);
        }
        Py_END_ALLOW_THREADS;
    }
    int failed = rows == NULL;
    PyMem_Free(rows);
    PyBuffer_Release(&texts);
    PyBuffer_Release(&templates);
    PyBuffer_Release(&raw);
    PyBuffer_Release(&data);
    return failed ? NULL : Py_NewRef(Py_None);
}

static int64_t largest(const seal_row *rows, Py_ssize_t count)
{
    int64_t most = 0;
    for (Py_ssize_t i = 0; i < count; i++)
        most = rows[i].size > most ? rows[i].size : most;
    return most;
}

static int all_sealed(const seal_row *rows, Py_ssize_t count, const char *texts, const char *templates, char *spare)
{
    for (Py_ssize_t i = 0; i < count; i++) {
        const char *text = texts + rows[i].at;
        int has_data = rows[i].end > rows[i].begin && rows[i].of_data[0] >= 0;
        uint32_t of_data = has_data ? number_at(text + rows[i].of_data[0]) : 0;
        seal_one(&rows[i], templates, of_data, spare);
        if (memcmp(text, spare, (size_t)rows[i].size))
            return 0;
    }
    return 1;
}

static PyObject *are_sealed(PyObject *module, PyObject *args)
{
    (void)module;
    Py_buffer texts, templates, raw;
    if (!PyArg_ParseTuple(args, "y*y*y*:are_sealed", &texts, &templates, &raw))
        return NULL;
    PyObject *found = NULL;
    char *spare = NULL;
    seal_row *rows = checked_rows(&raw, texts.len, templates.len, PY_SSIZE_T_MAX);
    Py_ssize_t count = raw.len / (Py_ssize_t)sizeof *rows;
    if (rows != NULL && (spare = PyMem_Malloc((size_t)largest(rows, count) + 1)) == NULL)
        PyErr_NoMemory();
    if (spare != NULL) {
        int sealed;
        Py_BEGIN_ALLOW_THREADS;
        sealed = all_sealed(rows, count, texts.buf, templates.buf, spare);
        Py_END_ALLOW_THREADS;
        found = PyBool_FromLong(sealed);
    }
    PyMem_Free(spare);
    PyMem_Free(rows);
    PyBuffer_Release(&texts);
    PyBuffer_Release(&templates);
    PyBuffer_Release(&raw);
    return found;
}

static PyObject *use_crc32(PyObject *module, PyObject *address)
{
    (void)module;
    uintptr_t found = (uintptr_t)PyLong_AsUnsignedLongLong(address);
    if (PyErr_Occurred())
        return NULL;
    crc32_of = (checksum_function)found;
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"use_crc32", use_crc32, METH_O, "Take checksums with zlib's function crc32 at this address; 0 for none."},
    {"seal", seal, METH_VARARGS, "Put each template into a buffer, with the checksums of its data."},
    {"are_sealed", are_sealed, METH_VARARGS, "Whether each text is its template with the checksums of some data."},
    {NULL, NULL, 0, NULL},
};

int tlcore_add_seals(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
