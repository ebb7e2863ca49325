/* Uses of operators that are what they were in the step before. */
#ifndef TLCORE_USING_H
#define TLCORE_USING_H

#include "again.h"

/* The parts of what is planned, in the order of `operator_uses.Planned`. */
enum {
    USE_FUNC, USE_FUNCTION, USE_CODE, USE_INSTRUCTION, USE_ARGS, USE_INPUTS, USE_KEYS, USE_KWARGS, USE_KEYWORDS,
    USE_DIRECTION, USE_PLACE, USE_KNOWN, USE_MAKE, USE_PARTS
};

#define USING_HOLDS 9

typedef struct {
    PyObject_HEAD
    union {
        struct {
            PyObject *walker, *operators, *collector, *known, *raw, *functions, *of, *ask, *line_of;
        };
        PyObject *held[USING_HOLDS];
    };
} using_object;

extern PyObject *tlcore_version_name;

/* Whether arguments are the same operands as once; -1 with an exception set. */
int tlcore_are_still(using_object *mine, PyObject *values, PyObject *before, PyObject *operands);
/* The same of keywords, and of their names. */
int tlcore_keywords_are_still(using_object *mine, PyObject *kwargs, PyObject *planned);
/* Whether a value certainly has no tensor that is not known; -1 with an exception set. */
int tlcore_knows(using_object *mine, PyObject *value);
int tlcore_make_operand_words(void);

#endif
