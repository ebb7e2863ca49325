/* Tensors that a batch has already: what one module gives, the next one is given, and so are views of it.
 *
 * Their bytes are compared, so it does not matter who may have written to them meanwhile. To compare takes less than
 * to copy, which fills memory that is mostly new, and what is not copied need not be hashed again.
 */
#include "taken.h"

#include <string.h>

/* Smaller ones are copied as fast, and for larger ones the interpreter's lock would be held too long. */
#define LEAST_BYTES (4 << 10)
#define MOST_BYTES (16 << 20)

static size_t slot_of(const tlcore_source *source)
{
    /* Memory of tensors begins at multiples of 64. */
    uint64_t word = ((uint64_t)(uintptr_t)source->data >> 6) * 0x9E3779B97F4A7C15u;
    return (size_t)(word >> 32) & (TLCORE_TAKEN_SLOTS - 1);
}

static int is_small_enough(const tlcore_source *source)
{
    return source->outer == 0 && source->bytes >= LEAST_BYTES && source->bytes <= MOST_BYTES;
}

void tlcore_forget_taken(taken_copies *all)
{
    all->batch++;
}

const taken_copy *tlcore_find_taken(const taken_copies *all, const tlcore_source *source)
{
    const taken_copy *one = &all->slots[slot_of(source)];
    if (!is_small_enough(source) || one->memory == NULL || one->batch != all->batch || one->data != source->data ||
        one->bytes != source->bytes)
        return NULL;
    const memory_object *memory = (const memory_object *)one->memory;
    return memcmp((const char *)memory->address + one->begin, source->data, (size_t)source->bytes) ? NULL : one;
}

void tlcore_note_taken(taken_copies *all, const tlcore_source *source, PyObject *memory, Py_ssize_t begin,
                       uint64_t batch)
{
    if (is_small_enough(source))
        all->slots[slot_of(source)] = (taken_copy){source->data, source->bytes, begin, memory, batch};
}
