/* Hashing a part of many files, and keeping the rest of each, in one call without the interpreter's lock. */
#include "beneath.h"

#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#define NOT_READ (-1)

/* A file's size, the part of it that is hashed, and where the rest is kept. */
typedef struct {
    int64_t size, begin, end, kept;
} span;

/* A file that was read, by what its hard links share. */
typedef struct {
    struct stat state;
    Py_ssize_t index; /* -1: nothing here */
} known_file;

typedef struct {
    const tlcore_places *files;
    const span *spans;
    char *kept;
    unsigned char *digests;
    Py_ssize_t *first;
    known_file *known;
    size_t mask;
    char *piece;
    void *hash;
} hashing;

/* Where a file with this state is in the table, or belongs. */
static known_file *slot_of(const hashing *job, const struct stat *state)
{
    uint64_t mixed = ((uint64_t)state->st_ino ^ (uint64_t)state->st_dev << 32) * UINT64_C(0x9E3779B97F4A7C15);
    for (size_t at = (size_t)(mixed >> 17);; at++) {
        known_file *slot = &job->known[at & job->mask];
        if (slot->index < 0 || (slot->state.st_ino == state->st_ino && slot->state.st_dev == state->st_dev))
            return slot;
    }
}

static int is_unchanged(const struct stat *now, const struct stat *then)
{
    return now->st_size == then->st_size && now->st_mtim.tv_sec == then->st_mtim.tv_sec &&
           now->st_mtim.tv_nsec == then->st_mtim.tv_nsec;
}

static int64_t within(int64_t value, int64_t least, int64_t most)
{
    return value < least ? least : value > most ? most : value;
}

/* Hash, and keep, what is in a piece of a file that begins at `at`. */
static void take_piece(const hashing *job, const span *one, int64_t at, int64_t size)
{
    int64_t begin = within(one->begin - at, 0, size), end = within(one->end - at, 0, size);
    char *kept = job->kept + one->kept;
    if (begin)
        memcpy(kept + at, job->piece, (size_t)begin);
    tlcore_hash_more(job->hash, job->piece + begin, (size_t)(end - begin));
    if (end < size)
        memcpy(kept + one->begin + (at + end - one->end), job->piece + end, (size_t)(size - end));
}

/* Whether file i was read; its state is entered. */
static int hash_file(const hashing *job, Py_ssize_t i)
{
    const span *one = &job->spans[i];
    struct stat state;
    int handle = tlcore_open_beneath(job->files->root, PyBytes_AsString(job->files->names[i]), &state);
    if (handle < 0)
        return 0;
    int64_t done = 0;
    tlcore_hash_begin(job->hash);
    while (state.st_size == one->size && done < one->size) {
        int64_t wanted = within(one->size - done, 0, TLCORE_PIECE_BYTES);
        ssize_t count = tlcore_read_piece(handle, job->piece, (size_t)wanted);
        if (count <= 0)
            break;
        take_piece(job, one, done, count);
        done += count;
    }
    close(handle);
    if (state.st_size != one->size || done != one->size)
        return 0;
    tlcore_hash_end(job->hash, job->digests + i * TLCORE_DIGEST_BYTES);
    known_file *slot = slot_of(job, &state);
    slot->state = state;
    slot->index = i;
    return 1;
}

static void hash_files(const hashing *job)
{
    for (Py_ssize_t i = 0; i < job->files->count; i++) {
        struct stat state;
        const char *name = PyBytes_AsString(job->files->names[i]);
        job->first[i] = NOT_READ;
        if (!tlcore_is_plain(name) || fstatat(job->files->root, name, &state, AT_SYMLINK_NOFOLLOW))
            continue;
        const known_file *same = slot_of(job, &state);
        Py_ssize_t j = same->index;
        if (j >= 0 && is_unchanged(&state, &same->state) && job->spans[i].size == job->spans[j].size &&
            job->spans[i].begin == job->spans[j].begin && job->spans[i].end == job->spans[j].end) {
            memcpy(job->digests + i * TLCORE_DIGEST_BYTES, job->digests + j * TLCORE_DIGEST_BYTES,
                   TLCORE_DIGEST_BYTES);
            job->first[i] = j;
        } else if (hash_file(job, i)) {
            job->first[i] = i;
        }
    }
}

/* The spans with where each file's rest is kept; NULL with an exception set. */
static span *checked_spans(const Py_buffer *raw, Py_ssize_t count, Py_ssize_t room)
{
    if (raw->len != count * 3 * (Py_ssize_t)sizeof(int64_t)) {
        PyErr_Format(PyExc_ValueError, "%zd files need as many spans of three 64-bit integers", count);
        return NULL;
    }
    span *spans = PyMem_Calloc((size_t)count + 1, sizeof *spans);
    if (spans == NULL)
        return (span *)PyErr_NoMemory();
    int64_t kept = 0;
    for (Py_ssize_t i = 0; i < count; i++) {
        span *one = &spans[i];
        memcpy(one, (const char *)raw->buf + (size_t)i * 3 * sizeof(int64_t), 3 * sizeof(int64_t));
        one->kept = kept;
        if (one->begin < 0 || one->end < one->begin || one->size < one->end ||
            one->size - (one->end - one->begin) > room - kept) {
            PyErr_Format(PyExc_ValueError, "span %zd: [%lld, %lld) of %lld bytes makes no sense, or leaves too many",
                         i, (long long)one->begin, (long long)one->end, (long long)one->size);
            PyMem_Free(spans);
            return NULL;
        }
        kept += one->size - (one->end - one->begin);
    }
    return spans;
}

static PyObject *indices_of(const Py_ssize_t *first, Py_ssize_t count)
{
    PyObject *list = PyList_New(count);
    for (Py_ssize_t i = 0; list != NULL && i < count; i++) {
        PyObject *number = PyLong_FromSsize_t(first[i]);
        if (number == NULL)
            Py_CLEAR(list);
        else
            PyList_SetItem(list, i, number);
    }
    return list;
}

static PyObject *run_hashing(const tlcore_places *files, const span *spans, char *kept)
{
    size_t slots = 8, count = (size_t)files->count;
    while (slots < 2 * count)
        slots *= 2;
    PyObject *found = NULL, *digests = PyBytes_FromStringAndSize(NULL, files->count * TLCORE_DIGEST_BYTES);
    hashing job = {.files = files, .spans = spans, .kept = kept, .mask = slots - 1};
    job.first = PyMem_Calloc(count + 1, sizeof *job.first);
    job.known = PyMem_Calloc(slots, sizeof *job.known);
    job.piece = PyMem_Malloc(TLCORE_PIECE_BYTES);
    job.hash = tlcore_hash_new();
    if (digests == NULL || job.first == NULL || job.known == NULL || job.piece == NULL || job.hash == NULL) {
        if (!PyErr_Occurred())
            PyErr_NoMemory();
    } else {
        /* Nobody else has the new object yet. */
        job.digests = (unsigned char *)PyBytes_AsString(digests);
        memset(job.digests, 0, count * TLCORE_DIGEST_BYTES);
        for (size_t i = 0; i < slots; i++)
            job.known[i].index = NOT_READ;
        Py_BEGIN_ALLOW_THREADS;
        hash_files(&job);
        Py_END_ALLOW_THREADS;
        PyObject *first = indices_of(job.first, files->count);
        found = first == NULL ? NULL : PyTuple_Pack(2, first, digests);
        Py_XDECREF(first);
    }
    if (job.hash != NULL)
        tlcore_hash_free(job.hash);
    PyMem_Free(job.piece);
    PyMem_Free(job.known);
    PyMem_Free(job.first);
    Py_XDECREF(digests);
    return found;
}

static PyObject *hash_payloads(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *directory, *names, *found = NULL;
    Py_buffer raw, kept;
    tlcore_places files;
    if (!PyArg_ParseTuple(args, "OOy*w*:hash_payloads", &directory, &names, &raw, &kept))
        return NULL;
    if (!tlcore_hashes_pieces()) {
        PyErr_SetString(PyExc_RuntimeError, "no hash functions have been given to the extension");
    } else if (tlcore_take_places(directory, names, &files) == 0) {
        span *spans = checked_spans(&raw, files.count, kept.len);
        if (spans != NULL)
            found = run_hashing(&files, spans, kept.buf);
        PyMem_Free(spans);
        tlcore_release_places(&files);
    }
    PyBuffer_Release(&raw);
    PyBuffer_Release(&kept);
    return found;
}

static PyMethodDef functions[] = {
    {"hash_payloads", hash_payloads, METH_VARARGS,
     "The XXH3-128 of a part of each file below a directory, and the rest of each in a buffer."},
    {NULL, NULL, 0, NULL},
};

int tlcore_add_payloads(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
