/* All tensors of a batch at once: where their bytes lie, what these hash to, which of them are equal. */
#include "pytree.h"

#include <string.h>

typedef struct {
    Py_ssize_t count;
    const char **data;
    int64_t *sizes, *kinds, *firsts;
    unsigned char (*digests)[TLCORE_DIGEST_BYTES];
    int64_t *table;
    size_t slots;
} batch;

/* The same memory stands for several tensors where these were equal when they were taken. A power of two. */
#define LAST_SLOTS 256

static void hash_tensors(batch *all)
{
    Py_ssize_t last[LAST_SLOTS];
    memset(last, 0xff, sizeof last);
    for (Py_ssize_t i = 0; i < all->count; i++) {
        Py_ssize_t *slot = &last[((uintptr_t)all->data[i] >> 6) & (LAST_SLOTS - 1)];
        if (*slot >= 0 && all->data[*slot] == all->data[i] && all->sizes[*slot] == all->sizes[i])
            memcpy(all->digests[i], all->digests[*slot], TLCORE_DIGEST_BYTES);
        else
            tlcore_digest(all->data[i], (size_t)all->sizes[i], all->digests[i]);
        *slot = i;
    }
}

/* For each tensor the first one of its kind with the same bytes, mostly itself. */
static void find_firsts(batch *all)
{
    memset(all->table, 0xff, all->slots * sizeof *all->table);
    for (Py_ssize_t i = 0; i < all->count; i++) {
        uint64_t word;
        memcpy(&word, all->digests[i], sizeof word);
        size_t slot = (size_t)word & (all->slots - 1);
        for (; all->table[slot] >= 0; slot = (slot + 1) & (all->slots - 1)) {
            int64_t other = all->table[slot];
            if (all->kinds[other] == all->kinds[i] &&
                memcmp(all->digests[other], all->digests[i], TLCORE_DIGEST_BYTES) == 0)
                break;
        }
        if (all->table[slot] < 0)
            all->table[slot] = i;
        all->firsts[i] = all->table[slot];
    }
}

/* Where the tensor at a place of the batch begins; NULL with an exception set where it is not inside its memory. */
static const char *address_of(PyObject *memories, PyObject *offsets, int64_t place, int64_t size)
{
    PyObject *memory = place < 0 ? NULL : PyList_GetItem(memories, (Py_ssize_t)place);
    PyObject *number = memory == NULL ? NULL : PyList_GetItem(offsets, (Py_ssize_t)place);
    if (number == NULL || !tlcore_is_memory(memory)) {
        if (!PyErr_Occurred())
            PyErr_Format(PyExc_ValueError, "there is no tensor at place %lld of the batch", (long long)place);
        return NULL;
    }
    memory_object *held = (memory_object *)memory;
    Py_ssize_t offset = size < 0 ? -1 : tlcore_size(number, held->size - (Py_ssize_t)size, "offset of a tensor");
    if (offset < 0) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_ValueError, "a tensor of negative size");
        return NULL;
    }
    return (const char *)held->address + offset;
}

static PyObject *results(const batch *all)
{
    return Py_BuildValue("(y#y#y#)", (const char *)all->data, all->count * (Py_ssize_t)sizeof *all->data,
                         (const char *)all->digests, all->count * TLCORE_DIGEST_BYTES, (const char *)all->firsts,
                         all->count * (Py_ssize_t)sizeof *all->firsts);
}

static PyObject *fingerprint(PyObject *module, PyObject *args)
{
    (void)module;
    PyObject *memories, *offsets, *found = NULL;
    Py_buffer places, sizes, kinds;
    if (!PyArg_ParseTuple(args, "O!O!y*y*y*:fingerprint", &PyList_Type, &memories, &PyList_Type, &offsets, &places,
                          &sizes, &kinds))
        return NULL;
    batch all = {.count = places.len / (Py_ssize_t)sizeof(int64_t), .sizes = sizes.buf, .kinds = kinds.buf, .slots = 64};
    while (all.slots < 2 * (size_t)all.count)
        all.slots *= 2;
    all.data = PyMem_Calloc((size_t)all.count + 1, sizeof *all.data);
    all.firsts = PyMem_Calloc((size_t)all.count + 1, sizeof *all.firsts);
    all.digests = PyMem_Calloc((size_t)all.count + 1, sizeof *all.digests);
    all.table = PyMem_Calloc(all.slots, sizeof *all.table);
    const int64_t *place = places.buf;
    if (!all.data || !all.firsts || !all.digests || !all.table) {
        PyErr_NoMemory();
    } else if (sizes.len != places.len || kinds.len != places.len || !tlcore_can_hash()) {
        PyErr_SetString(PyExc_ValueError, "as many sizes and kinds as places are needed, and a hash function");
    } else {
        for (Py_ssize_t i = 0; i < all.count && !PyErr_Occurred(); i++)
            all.data[i] = address_of(memories, offsets, place[i], all.sizes[i]);
        if (!PyErr_Occurred()) {
            Py_BEGIN_ALLOW_THREADS;
            hash_tensors(&all);
            find_firsts(&all);
            Py_END_ALLOW_THREADS;
            found = results(&all);
        }
    }
    PyMem_Free(all.data);
    PyMem_Free(all.firsts);
    PyMem_Free(all.digests);
    PyMem_Free(all.table);
    PyBuffer_Release(&places);
    PyBuffer_Release(&sizes);
    PyBuffer_Release(&kinds);
    return found;
}

/* --- putting together what was looked at --- */

#if defined(__SSE2__)
#include <emmintrin.h>

#define LINE_BYTES 64
/* Less is likely read again before it leaves the caches. */
#define LEAST_STREAMED (1 << 20)

/* As memcpy, past the caches: what was there is not read before it is overwritten. */
static void stream(char *target, const char *source, size_t size)
{
    size_t lead = (size_t)(-(uintptr_t)target & (LINE_BYTES - 1));
    if (size < 2 * LINE_BYTES) {
        memcpy(target, source, size);
        return;
    }
    memcpy(target, source, lead);
    for (target += lead, source += lead, size -= lead; size >= LINE_BYTES;
         target += LINE_BYTES, source += LINE_BYTES, size -= LINE_BYTES)
        for (int i = 0; i < LINE_BYTES; i += 16)
            _mm_stream_si128((__m128i *)(void *)(target + i), _mm_loadu_si128((const __m128i *)(const void *)(source + i)));
    memcpy(target, source, size);
}
#endif

/* Copy those that are their own first, one behind the other. */
static void copy_firsts(char *end, Py_ssize_t room, const char *const *data, const int64_t *size, const int64_t *first,
                        Py_ssize_t count)
{
#if defined(__SSE2__)
    int streams = room >= LEAST_STREAMED;
#else
    (void)room;
#endif
    for (Py_ssize_t i = 0; i < count; i++) {
        if (first[i] != i)
            continue;
#if defined(__SSE2__)
        if (streams)
            stream(end, data[i], (size_t)size[i]);
        else
#endif
            memcpy(end, data[i], (size_t)size[i]);
        end += size[i];
    }
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

/* How many bytes the first ones have; -1 where that is more than there can be. */
static Py_ssize_t bytes_of_firsts(const int64_t *sizes, const int64_t *firsts, Py_ssize_t count)
{
    Py_ssize_t total = 0;
    for (Py_ssize_t i = 0; i < count; i++)
        if (firsts[i] == i && (sizes[i] < 0 || __builtin_add_overflow(total, (Py_ssize_t)sizes[i], &total)))
            return -1;
    return total;
}

static PyObject *collect(PyObject *module, PyObject *args)
{
    (void)module;
    Py_buffer target, addresses, sizes, firsts;
    if (!PyArg_ParseTuple(args, "w*y*y*y*:collect", &target, &addresses, &sizes, &firsts))
        return NULL;
    Py_ssize_t count = addresses.len / (Py_ssize_t)sizeof(char *);
    const char *const *data = addresses.buf;
    const int64_t *size = sizes.buf, *first = firsts.buf;
    int fits = sizes.len == addresses.len && firsts.len == addresses.len &&
               bytes_of_firsts(size, first, count) == target.len;
    if (fits) {
        Py_BEGIN_ALLOW_THREADS;
        copy_firsts(target.buf, target.len, data, size, first, count);
        Py_END_ALLOW_THREADS;
    } else {
        PyErr_SetString(PyExc_ValueError, "the tensors do not fill the memory exactly");
    }
    PyBuffer_Release(&target);
    PyBuffer_Release(&addresses);
    PyBuffer_Release(&sizes);
    PyBuffer_Release(&firsts);
    return fits ? Py_NewRef(Py_None) : NULL;
}

static PyMethodDef functions[] = {
    {"fingerprint", fingerprint, METH_VARARGS,
     "Of the tensors at these places of lists of memories and offsets, of these sizes and kinds (64-bit numbers): their "
     "addresses, their XXH3-128, and the first of each one's kind with the same bytes."},
    {"collect", collect, METH_VARARGS,
     "Copy those that are their own first, by what `fingerprint` said while their memory is held."},
    {NULL, NULL, 0, NULL},
};

int tlcore_add_fingerprint(PyObject *module)
{
    return PyModule_AddFunctions(module, functions);
}
