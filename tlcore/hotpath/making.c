/* Making many small files below a directory in one call without the interpreter's lock. */
#include "beneath.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#define FILE_MODE 0600
#define FOLDER_MODE 0700

typedef struct {
    int64_t begin, end;
} range;

/* What a file has: a range of the texts, one of the data, one more of the texts; or that of an earlier one (-1:
 * of none), of which it then is another name. */
typedef struct {
    range head, data, tail;
    int64_t same_as;
} file_row;

typedef struct {
    const tlcore_places *folders, *files;
    const file_row *rows;
    char *texts, *data;
} making;

static struct iovec part_of(char *memory, range where)
{
    struct iovec part = {memory + where.begin, (size_t)(where.end - where.begin)};
    return part;
}

static int make_file(const making *job, const char *name, const file_row *row)
{
    int handle = openat(job->files->root, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, FILE_MODE);
    if (handle < 0)
        return errno;
    struct iovec parts[] = {
        part_of(job->texts, row->head), part_of(job->data, row->data), part_of(job->texts, row->tail)};
    int error = tlcore_move_all(writev, handle, parts, 3, TLCORE_PIECE_BYTES);
    if (close(handle) && !error)
        error = errno;
    return error;
}

static int links_are_refused(int error)
{
    return error == EPERM || error == EMLINK || error == EXDEV || error == ENOSYS || error == EOPNOTSUPP;
}

static int make_one(const making *job, Py_ssize_t i)
{
    const char *name = PyBytes_AsString(job->files->names[i]);
    const file_row *row = &job->rows[i];
    if (!tlcore_is_plain(name))
        return EINVAL;
    if (row->same_as < 0)
        return make_file(job, name, row);
    const char *first = PyBytes_AsString(job->files->names[row->same_as]);
    if (linkat(job->files->root, first, job->files->root, name, 0) == 0)
        return 0;
    return links_are_refused(errno) ? make_file(job, name, &job->rows[row->same_as]) : errno;
}

/* 0, or the system's error with the name that it is about. */
static int make_all(const making *job, const char **about)
{
    int error = 0;
    for (Py_ssize_t i = 0; i < job->folders->count && !error; i++) {
        *about = PyBytes_AsString(job->folders->names[i]);
        if (!tlcore_is_plain(*about))
            error = EINVAL;
        else if (mkdirat(job->folders->root, *about, FOLDER_MODE))
            error = errno;
    }
    for (Py_ssize_t i = 0; i < job->files->count && !error; i++) {
        *about = PyBytes_AsString(job->files->names[i]);
        error = make_one(job, i);
    }
    return error;
}

static int is_in(range where, Py_ssize_t room)
{
    return 0 <= where.begin && where.begin <= where.end && where.end <= room;
}

/* The rows, checked; NULL with an exception set. */
static file_row *checked_rows(const Py_buffer *raw, Py_ssize_t count, Py_ssize_t texts, Py_ssize_t data)
{
    if (raw->len != count * (Py_ssize_t)sizeof(file_row)) {
        PyErr_Format(PyExc_ValueError, "%zd files need as many rows of seven 64-bit integers", count);
        return NULL;
    }
    file_row *rows = PyMem_Calloc((size_t)count + 1, sizeof *rows);
    if (rows == NULL)
        return (file_row *)PyErr_NoMemory();
    if (count)
        memcpy(rows, raw->buf, (size_t)raw->len);
    for (Py_ssize_t i = 0; i < count; i++) {
        const file_row *row = &rows[i];
        int linked = row->same_as >= 0;
        if (!is_in(row->head, texts) || !is_in(row->tail, texts) || !is_in(row->data, data) || row->same_as < -1 ||
            (linked && (row->same_as >= i || rows[row->same_as].same_as >= 0))) {
            PyErr_Format(PyExc_ValueError, "file %zd has parts that are not there", i);
            PyMem_Free(rows);
            return NULL;
        }
    }
    return rows;
}

static PyObject *run_making(making *job, const Py_buffer *raw, Py_ssize_t texts, Py_ssize_t data)
{
    file_row *rows = checked_rows(raw, job->files->count, texts, data);
    if (rows == NULL)
        return NULL;
    const char *about = PyBytes_AsString(job->files->directory);
    int error = ENOENT;
    job->rows = rows;
    if (job->files->root >= 0 && job->folders->root >= 0) {
        Py_BEGIN_ALLOW_THREADS;
        error = make_all(job, &about);
        Py_END_ALLOW_THREADS;
    }
    PyMem_Free(rows);
    if (!error)
        return Py_NewRef(Py_None);
    errno = error;
    return PyErr_SetFromErrnoWithFilename(PyExc_OSError, about);
}

static PyObject *make_files(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *directory, *folder_names, *names, *done = NULL;
    Py_buffer raw, texts, data;
    tlcore_places folders, files;
    if (!PyArg_ParseTuple(args, "OOOy*y*y*:make_files", &directory, &folder_names, &names, &raw, &texts, &data))
        return NULL;
    if (tlcore_take_places(directory, folder_names, &folders) == 0) {
        if (tlcore_take_places(directory, names, &files) == 0) {
            making job = {.folders = &folders, .files = &files, .texts = texts.buf, .data = data.buf};
            done = run_making(&job, &raw, texts.len, data.len);
            tlcore_release_places(&files);
        }
        tlcore_release_places(&folders);
    }
    PyBuffer_Release(&raw);
    PyBuffer_Release(&texts);
    PyBuffer_Release(&data);
    return done;
}

static PyMethodDef functions[] = {
    {"make_files", make_files, METH_VARARGS, "Make directories and files below a directory, of parts of buffers."},
    {NULL, NULL, 0, NULL},
};

int tlcore_add_making(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
