/* Reading rows of many files straight to where they belong, in one call without the interpreter's lock. */
#include "beneath.h"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Pieces of memory that one read fills; some systems take no more than 1024. */
#define MOST_PARTS 256
/* What one read may ask for on any system. */
#define MOST_AT_ONCE ((size_t)1 << 30)

/* Rows of a file, by the file's number, and the first row that they become. */
typedef struct {
    int64_t file, row, at, count;
} piece;

typedef struct {
    const tlcore_places *files;
    Py_ssize_t size;      /* of each file, which begins with `head` */
    const Py_buffer *head;
    const piece *pieces;
    Py_ssize_t count;
    char *rows;           /* the target's first, `stride` bytes from one to the next */
    Py_ssize_t stride, width;
    char *begin;          /* room for a file's head */
    unsigned char *read;  /* for each file, whether it was */
} reading;

/* Fill the parts with what lies in a file from `offset` on. */
static int fill(int handle, int64_t offset, struct iovec *parts, int count)
{
    return lseek(handle, (off_t)offset, SEEK_SET) == (off_t)offset &&
           tlcore_move_all(readv, handle, parts, count, MOST_AT_ONCE) == 0;
}

/* The rows of some pieces of one file; those that follow one another there are read together. */
static int read_pieces(const reading *job, int handle, Py_ssize_t first, Py_ssize_t last)
{
    struct iovec parts[MOST_PARTS];
    int used = 0;
    int64_t begin = 0, end = -1;
    for (Py_ssize_t i = first; i < last; i++) {
        const piece *one = &job->pieces[i];
        int64_t together = job->stride == job->width ? one->count : 1;
        for (int64_t done = 0; done < one->count; done += together) {
            int64_t from = job->head->len + (one->row + done) * job->width;
            if (used == MOST_PARTS || from != end) {
                if (used && !fill(handle, begin, parts, used))
                    return 0;
                used = 0;
                begin = from;
            }
            parts[used].iov_base = job->rows + (one->at + done) * job->stride;
            parts[used++].iov_len = (size_t)(together * job->width);
            end = from + together * job->width;
        }
    }
    return !used || fill(handle, begin, parts, used);
}

static int read_file(const reading *job, Py_ssize_t number, Py_ssize_t first, Py_ssize_t last)
{
    struct stat state;
    int handle = tlcore_open_beneath(job->files->root, PyBytes_AsString(job->files->names[number]), &state);
    if (handle < 0)
        return 0;
    size_t head = (size_t)job->head->len;
    int sound = state.st_size == job->size && tlcore_read_piece(handle, job->begin, head) == (ssize_t)head &&
                memcmp(job->begin, job->head->buf, head) == 0 && read_pieces(job, handle, first, last);
    close(handle);
    return sound;
}

static void read_all(const reading *job)
{
    for (Py_ssize_t first = 0, last; first < job->count; first = last) {
        int64_t number = job->pieces[first].file;
        for (last = first + 1; last < job->count && job->pieces[last].file == number; last++)
            ;
        job->read[number] = (unsigned char)read_file(job, (Py_ssize_t)number, first, last);
    }
}

/* Whether each piece lies in its file and in the target; 0 with an exception set. */
static int check_pieces(const reading *job, const Py_buffer *target)
{
    int64_t rows = job->width ? (job->size - job->head->len) / job->width : 0, file = 0;
    for (Py_ssize_t i = 0; i < job->count; i++) {
        const piece *one = &job->pieces[i];
        if (one->file < file || one->file >= job->files->count || one->count < 0 || one->row < 0 || one->at < 0 ||
            one->row > rows - one->count || one->at > target->shape[0] - one->count) {
            PyErr_Format(PyExc_ValueError, "piece %zd: %lld rows from %lld on of file %lld, put at %lld, do not fit", i,
                         (long long)one->count, (long long)one->row, (long long)one->file, (long long)one->at);
            return 0;
        }
        file = one->file;
    }
    return 1;
}

static PyObject *run_reading(reading *job, const Py_buffer *raw, const Py_buffer *target)
{
    if (target->ndim != 2 || target->itemsize != 1 || (target->shape[1] > 1 && target->strides[1] != 1))
        return PyErr_Format(PyExc_ValueError, "rows are put into a matrix of bytes");
    if (job->size < job->head->len || raw->len % (Py_ssize_t)sizeof(piece))
        return PyErr_Format(PyExc_ValueError, "files are as long as their head, and pieces four 64-bit integers");
    job->rows = target->buf;
    job->stride = target->strides[0];
    job->width = target->shape[1];
    job->count = raw->len / (Py_ssize_t)sizeof(piece);
    /* A buffer of numbers may begin anywhere in memory. */
    piece *pieces = PyMem_Calloc((size_t)job->count + 1, sizeof *pieces);
    job->begin = PyMem_Calloc((size_t)job->head->len + 1, 1);
    PyObject *found = PyBytes_FromStringAndSize(NULL, job->files->count);
    if (pieces == NULL || job->begin == NULL || found == NULL) {
        PyErr_NoMemory();
        Py_CLEAR(found);
    } else {
        memcpy(pieces, raw->buf, (size_t)raw->len);
        job->pieces = pieces;
        /* Nobody else has the new object yet. */
        job->read = (unsigned char *)PyBytes_AsString(found);
        memset(job->read, 0, (size_t)job->files->count);
        if (check_pieces(job, target)) {
            Py_BEGIN_ALLOW_THREADS;
            read_all(job);
            Py_END_ALLOW_THREADS;
        } else {
            Py_CLEAR(found);
        }
    }
    PyMem_Free(pieces);
    PyMem_Free(job->begin);
    return found;
}

static PyObject *read_rows(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *directory, *names, *number, *matrix, *found = NULL;
    Py_buffer head, raw, target;
    tlcore_places files;
    if (!PyArg_ParseTuple(args, "OOOy*y*O:read_rows", &directory, &names, &number, &head, &raw, &matrix))
        return NULL;
    reading job = {.files = &files, .head = &head, .size = tlcore_size(number, PY_SSIZE_T_MAX / 4, "size of a file")};
    if (job.size >= 0 && PyObject_GetBuffer(matrix, &target, PyBUF_STRIDED | PyBUF_WRITABLE) == 0) {
        if (tlcore_take_places(directory, names, &files) == 0) {
            found = run_reading(&job, &raw, &target);
            tlcore_release_places(&files);
        }
        PyBuffer_Release(&target);
    }
    PyBuffer_Release(&head);
    PyBuffer_Release(&raw);
    return found;
}

static PyMethodDef functions[] = {
    {"read_rows", read_rows, METH_VARARGS,
     "Read rows of files below a directory to their places in a matrix of bytes; which files were read."},
    {NULL, NULL, 0, NULL},
};

int tlcore_add_rows(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
