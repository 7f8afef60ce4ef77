/* What mypyc leaves out: at each place of the compiled code that reads an attribute of a plain object or makes a struct of
 * msgspec's, remember how that was done for the type of object seen there last, or for the first struct made there. Python's own
 * interpreter does the same. What is remembered is guarded by the interpreter's lock and belongs to one interpreter, as all
 * that mypyc keeps does.
 *
 * Included into the C that mypyc makes, behind its library (see experiments/compiled.py). Every shortcut is keyed by the
 * type and its version tag, which Python changes with any change of the type or its bases; whatever is not exactly the
 * plain case goes the way it would have gone. heapq's and bisect's functions are done in place.
 */
#if PY_VERSION_HEX >= 0x030B0000 && PY_VERSION_HEX < 0x030E0000 && !defined(Py_GIL_DISABLED) && defined(__GNUC__)
#include <structmember.h>
#include "compiled_integers.h"

/* ---- attributes that lie in the object: __slots__, and the fields of structs ------------------------------------- */

typedef struct {
    PyTypeObject *type;
    unsigned int version;
    Py_ssize_t offset;
} attribute_cache;

static PyObject *attribute_missed(PyObject *object, PyObject *name, attribute_cache *cache) {
    PyTypeObject *type = Py_TYPE(object);
    if (type->tp_getattro == PyObject_GenericGetAttr) {
        PyObject *found = _PyType_Lookup(type, name); /* borrowed; gives the type a version tag */
        if (found != NULL && Py_IS_TYPE(found, &PyMemberDescr_Type) && type->tp_version_tag != 0) {
            PyMemberDef *member = ((PyMemberDescrObject *)found)->d_member;
            if (member->type == T_OBJECT_EX && PyType_IsSubtype(type, PyDescr_TYPE(found))) {
                cache->type = type;
                cache->version = type->tp_version_tag;
                cache->offset = member->offset;
            }
        }
    }
    return PyObject_GetAttr(object, name);
}

static inline PyObject *attribute_of(PyObject *object, PyObject *name, attribute_cache *cache) {
    PyTypeObject *type = Py_TYPE(object);
    if (likely(type == cache->type && type->tp_version_tag == cache->version)) {
        PyObject *value = *(PyObject **)((char *)object + cache->offset);
        if (likely(value != NULL)) {
            return Py_NewRef(value);
        }
    }
    return attribute_missed(object, name, cache);
}

#undef CPyObject_GetAttr
#define CPyObject_GetAttr(object, name) ({ static attribute_cache cache_; attribute_of(object, name, &cache_); })

/* ---- structs that are free: the next of their type takes their place ------------------------------------------------ */

#define MOST_TYPES 256 /* a power of two, and never half full */
#define MOST_FREE 64   /* of each type */
#define DEEPEST 50     /* structs that die with a struct that dies … */

typedef struct {
    PyTypeObject *type;
    Py_ssize_t num_fields;
    PyObject *names; /* of the fields, as they lie */
    PyObject *free;  /* the first field of each is the next */
    int num_free;
} struct_pool;

static struct_pool pools[MOST_TYPES];
static int num_pools;
static destructor dealloc_of_structs; /* msgspec's, for what the collector does not look at */

static inline struct_pool *place_of_pool(PyTypeObject *type) {
    size_t i = (size_t)type >> 5 & (MOST_TYPES - 1);
    while (pools[i].type != type && pools[i].type != NULL) {
        i = (i + 1) & (MOST_TYPES - 1);
    }
    return &pools[i];
}

/* A struct of this pool, whose fields are still to be filled; NULL with an exception. */
static inline PyObject *struct_of(PyTypeObject *type, struct_pool *pool) {
    PyObject *made = pool == NULL ? NULL : pool->free;
    if (likely(made != NULL)) {
        pool->free = *(PyObject **)((char *)made + sizeof(PyObject));
        pool->num_free--;
        Py_SET_REFCNT(made, 1);
        return made;
    }
    return _PyObject_New(type);
}

static void struct_dealloc(PyObject *self) {
    static int depth;
    struct_pool *pool = place_of_pool(Py_TYPE(self));
    if (unlikely(pool->type == NULL || pool->num_free == MOST_FREE || depth == DEEPEST)) {
        dealloc_of_structs(self);
        return;
    }
    PyObject **fields = (PyObject **)((char *)self + sizeof(PyObject));
    depth++;
    for (Py_ssize_t i = 0; i < pool->num_fields; i++) {
        Py_XDECREF(fields[i]);
    }
    depth--;
    fields[0] = pool->free;
    pool->free = self; /* which keeps its reference to its type */
    pool->num_free++;
}

/* The pool of a type whose structs are a head and `num_fields` references; NULL if it may have none. */
static struct_pool *pool_of(PyTypeObject *type, Py_ssize_t num_fields, PyObject *names, const Py_ssize_t *offsets) {
    struct_pool *pool = place_of_pool(type);
    if (pool->type != NULL) {
        return pool;
    }
    if (num_fields == 0 || num_pools == MOST_TYPES / 2 || (dealloc_of_structs != NULL && type->tp_dealloc != dealloc_of_structs)) {
        return NULL;
    }
    PyObject *as_they_lie = PyTuple_New(num_fields);
    if (as_they_lie == NULL) {
        PyErr_Clear();
        return NULL;
    }
    for (Py_ssize_t i = 0; i < num_fields; i++) { /* Python orders slots by their names */
        PyTuple_SET_ITEM(as_they_lie, (offsets[i] - sizeof(PyObject)) / sizeof(PyObject *), Py_NewRef(PyTuple_GET_ITEM(names, i)));
    }
    num_pools++;
    pool->num_fields = num_fields;
    pool->names = as_they_lie;
    pool->type = (PyTypeObject *)Py_NewRef(type);
    dealloc_of_structs = type->tp_dealloc;
    type->tp_dealloc = struct_dealloc;
    return pool;
}

/* ---- structs of msgspec's that the collector of cycles does not look at ------------------------------------------- */

#define MOST_FIELDS 32

typedef enum { ANY, HEAPPUSH, HEAPPOP, BISECT_LEFT, BISECT_RIGHT, WRITE_LIST, REPLACE } special_kind;

typedef struct {
    PyTypeObject *type; /* NULL: nothing known yet */
    struct_pool *pool;   /* NULL for none */
    PyObject *callable;  /* what was called here last that made no such struct */
    special_kind kind;   /* which it is of those done in place */
    int num_tries;       /* to learn how a struct is made here */
    unsigned int version;
    PyObject *names; /* of the arguments given by keyword, as the compiled code has them; NULL for none */
    Py_ssize_t num_given;
    Py_ssize_t num_fields;
    Py_ssize_t offset[MOST_FIELDS]; /* of the field that each argument is for, then of those that get their default */
    PyObject *value[MOST_FIELDS];   /* of the latter */
} struct_cache;

/* Whether `made`, which msgspec has just made of `arguments`, is what the fast way would have made of them; if so note how. */
static void learn_struct(struct_cache *cache, PyTypeObject *type, PyObject *made, PyObject *const *arguments,
                         Py_ssize_t num_positional, PyObject *names) {
    PyObject *fields = NULL, *defaults = NULL;
    int is_taken[MOST_FIELDS] = {0};
    Py_ssize_t num_names = names == NULL ? 0 : PyTuple_GET_SIZE(names);
    Py_ssize_t num_given = num_positional + num_names;
    PyObject *after_init = PyUnicode_InternFromString("__post_init__");
    if (after_init == NULL || _PyType_Lookup(type, after_init) != NULL || PyType_IS_GC(type)
        || type->tp_version_tag == 0 || type->tp_weaklistoffset != 0 || type->tp_dictoffset != 0) {
        goto done;
    }
    fields = PyObject_GetAttrString((PyObject *)type, "__struct_fields__");
    defaults = PyObject_GetAttrString((PyObject *)type, "__struct_defaults__");
    if (fields == NULL || defaults == NULL || !PyTuple_Check(fields) || !PyTuple_Check(defaults)) {
        goto done;
    }
    Py_ssize_t num_fields = PyTuple_GET_SIZE(fields), num_defaults = PyTuple_GET_SIZE(defaults);
    if (num_fields > MOST_FIELDS || num_given > num_fields
        || type->tp_basicsize != (Py_ssize_t)(sizeof(PyObject) + num_fields * sizeof(PyObject *))) {
        goto done;
    }
    Py_ssize_t offsets[MOST_FIELDS];
    for (Py_ssize_t i = 0; i < num_fields; i++) {
        PyObject *found = _PyType_Lookup(type, PyTuple_GET_ITEM(fields, i));
        if (found == NULL || !Py_IS_TYPE(found, &PyMemberDescr_Type)) {
            goto done;
        }
        PyMemberDef *member = ((PyMemberDescrObject *)found)->d_member;
        if (member->type != T_OBJECT_EX) {
            goto done;
        }
        offsets[i] = member->offset;
    }
    Py_ssize_t filled = 0;
    for (Py_ssize_t i = 0; i < num_given; i++) {
        Py_ssize_t field = i;
        if (i >= num_positional) {
            PyObject *name = PyTuple_GET_ITEM(names, i - num_positional);
            for (field = 0; field < num_fields && PyTuple_GET_ITEM(fields, field) != name; field++) {
            }
        }
        if (field == num_fields || is_taken[field]
            || *(PyObject **)((char *)made + offsets[field]) != arguments[i]) {
            goto done;
        }
        is_taken[field] = 1;
        cache->offset[filled++] = offsets[field];
    }
    for (Py_ssize_t i = 0; i < num_fields; i++) {
        if (is_taken[i]) {
            continue;
        }
        Py_ssize_t at = i - (num_fields - num_defaults);
        PyObject *value = *(PyObject **)((char *)made + offsets[i]);
        if (at < 0 || PyTuple_GET_ITEM(defaults, at) != value) { /* else one is made for each object */
            goto done;
        }
        cache->value[filled] = value; /* the type keeps it */
        cache->offset[filled++] = offsets[i];
    }
    cache->pool = pool_of(type, num_fields, fields, offsets);
    cache->version = type->tp_version_tag;
    cache->names = Py_XNewRef(names);
    cache->num_given = num_given;
    cache->num_fields = num_fields;
    cache->type = (PyTypeObject *)Py_NewRef(type);
done:
    Py_XDECREF(after_init);
    Py_XDECREF(fields);
    Py_XDECREF(defaults);
    PyErr_Clear();
}

#include "compiled_heaps.h"

/* ---- methods of Python's own types: deque's, dict's, set's ----------------------------------------------------------- */

typedef struct {
    PyTypeObject *type;
    unsigned int version;
    PyObject *function; /* the type keeps it */
} method_cache;

static PyObject *method_missed(PyObject *name, PyObject *const *arguments, size_t flags, PyObject *names, method_cache *cache) {
    PyTypeObject *type = Py_TYPE(arguments[0]);
    if (type->tp_getattro == PyObject_GenericGetAttr && type->tp_dictoffset == 0
        && !(type->tp_flags & Py_TPFLAGS_MANAGED_DICT)) { /* nothing of the object's own goes before its type's */
        PyObject *found = _PyType_Lookup(type, name);
        if (found != NULL && Py_IS_TYPE(found, &PyMethodDescr_Type) && type->tp_version_tag != 0
            && PyType_IsSubtype(type, PyDescr_TYPE(found))) {
            cache->type = type;
            cache->version = type->tp_version_tag;
            cache->function = found;
        }
    }
    return PyObject_VectorcallMethod(name, arguments, flags, names);
}

static inline PyObject *method_called(PyObject *name, PyObject *const *arguments, size_t flags, PyObject *names,
                                      method_cache *cache) {
    PyTypeObject *type = Py_TYPE(arguments[0]);
    if (unlikely(type != cache->type || type->tp_version_tag != cache->version || names != NULL)) {
        return method_missed(name, arguments, flags, names, cache);
    }
    PyMethodDef *method = ((PyMethodDescrObject *)cache->function)->d_method;
    Py_ssize_t number = PyVectorcall_NARGS(flags);
    int kind = method->ml_flags & (METH_VARARGS | METH_FASTCALL | METH_NOARGS | METH_O | METH_KEYWORDS | METH_METHOD);
    if (kind == METH_NOARGS && number == 1) {
        return method->ml_meth(arguments[0], NULL);
    }
    if (kind == METH_O && number == 2) {
        return method->ml_meth(arguments[0], arguments[1]);
    }
    if (kind == METH_FASTCALL) {
        return ((_PyCFunctionFast)(void (*)(void))method->ml_meth)(arguments[0], arguments + 1, number - 1);
    }
    return (PyObject_Vectorcall)(cache->function, arguments, (size_t)number, NULL);
}

#undef PyObject_VectorcallMethod
#define PyObject_VectorcallMethod(name, arguments, flags, names) \
    ({ static method_cache cache_; method_called(name, arguments, flags, names, &cache_); })

/* ---- msgspec's replace, of a struct whose type has a pool ----------------------------------------------------------- */

static PyObject *replaced(PyObject *old, PyObject *const *values, PyObject *names) { /* NULL without an exception: cannot say */
    struct_pool *pool = place_of_pool(Py_TYPE(old));
    if (pool->type == NULL) {
        return NULL;
    }
    Py_ssize_t places[MOST_FIELDS], num_names = PyTuple_GET_SIZE(names);
    if (num_names > MOST_FIELDS) {
        return NULL;
    }
    for (Py_ssize_t i = 0; i < num_names; i++) {
        Py_ssize_t place = 0;
        while (place < pool->num_fields && PyTuple_GET_ITEM(pool->names, place) != PyTuple_GET_ITEM(names, i)) {
            place++;
        }
        if (place == pool->num_fields) {
            return NULL;
        }
        places[i] = place;
    }
    PyObject *made = struct_of(pool->type, pool);
    if (made == NULL) {
        PyErr_Clear();
        return NULL;
    }
    PyObject **to = (PyObject **)((char *)made + sizeof(PyObject)), **from = (PyObject **)((char *)old + sizeof(PyObject));
    for (Py_ssize_t i = 0; i < pool->num_fields; i++) {
        to[i] = Py_XNewRef(from[i]);
    }
    for (Py_ssize_t i = 0; i < num_names; i++) {
        PyObject *before = to[places[i]];
        to[places[i]] = Py_NewRef(values[i]);
        Py_XDECREF(before);
    }
    return made;
}

/* ---- some cells of a list, written in their place: list.__setitem__ of a slice and as many items ----------------------- */

static int written_in_place(PyObject *list, PyObject *places, PyObject *items) { /* false: nothing was done */
    if (!PyList_Check(list) || !PySlice_Check(places) || !PyTuple_CheckExact(items)
        || ((PySliceObject *)places)->step != Py_None) {
        return 0;
    }
    PyObject *first_ = ((PySliceObject *)places)->start, *end_ = ((PySliceObject *)places)->stop;
    if (!PyLong_CheckExact(first_) || !PyLong_CheckExact(end_)) {
        return 0;
    }
    Py_ssize_t first = PyLong_AsSsize_t(first_), end = PyLong_AsSsize_t(end_);
    if (first < 0 || end > PyList_GET_SIZE(list) || end - first != PyTuple_GET_SIZE(items)) {
        PyErr_Clear();
        return 0;
    }
    for (Py_ssize_t i = first; i < end && i < PyList_GET_SIZE(list); i++) {
        PyObject *before = PyList_GET_ITEM(list, i);
        PyList_SET_ITEM(list, i, Py_NewRef(PyTuple_GET_ITEM(items, i - first)));
        Py_DECREF(before);
    }
    return 1;
}

/* ---- calls ---------------------------------------------------------------------------------------------------------- */

static PyObject *heappush_, *heappop_, *bisect_left_, *bisect_right_, *replace_, *write_list_; /* as Python knows them */

static PyObject *function_of(const char *module_name, const char *name) {
    PyObject *function = NULL, *module = PyImport_ImportModule(module_name);
    if (module != NULL) {
        function = PyObject_GetAttrString(module, name);
        Py_DECREF(module);
    }
    PyErr_Clear();
    return function;
}

static special_kind kind_of(PyObject *callable) {
    static int is_sought = 0;
    if (!is_sought) {
        is_sought = 1;
        heappush_ = function_of("_heapq", "heappush");
        heappop_ = function_of("_heapq", "heappop");
        bisect_left_ = function_of("_bisect", "bisect_left");
        bisect_right_ = function_of("_bisect", "bisect_right");
        replace_ = function_of("msgspec._core", "replace");
        write_list_ = PyObject_GetAttrString((PyObject *)&PyList_Type, "__setitem__");
        PyErr_Clear();
    }
    return callable == heappush_       ? HEAPPUSH
           : callable == heappop_      ? HEAPPOP
           : callable == bisect_left_  ? BISECT_LEFT
           : callable == bisect_right_ ? BISECT_RIGHT
           : callable == write_list_   ? WRITE_LIST
           : callable == replace_      ? REPLACE
                                       : ANY;
}

static PyObject *call_missed(PyObject *callable, PyObject *const *arguments, size_t flags, PyObject *names,
                             struct_cache *cache) {
    if (unlikely(callable != cache->callable)) { /* those done in place are kept, so that their addresses stay theirs */
        cache->kind = kind_of(callable);
        cache->callable = callable;
    }
    Py_ssize_t number = PyVectorcall_NARGS(flags), place;
    PyObject *made;
    switch (names == NULL || cache->kind == REPLACE ? cache->kind : ANY) {
    case HEAPPUSH:
        if (number == 2 && PyList_CheckExact(arguments[0])) {
            return heap_push(arguments[0], arguments[1]);
        }
        break;
    case HEAPPOP:
        if (number == 1 && PyList_CheckExact(arguments[0]) && PyList_GET_SIZE(arguments[0]) > 0) {
            return heap_pop(arguments[0]);
        }
        break;
    case BISECT_LEFT:
    case BISECT_RIGHT:
        if (number == 2 && (place = place_among_integers(arguments[0], arguments[1], cache->kind == BISECT_RIGHT)) >= 0) {
            return boxed((CPyTagged)place << 1);
        }
        break;
    case WRITE_LIST:
        if (number == 3 && written_in_place(arguments[0], arguments[1], arguments[2])) {
            return Py_NewRef(Py_None);
        }
        break;
    case REPLACE:
        if (number == 1 && names != NULL && (made = replaced(arguments[0], arguments + 1, names)) != NULL) {
            return made;
        }
        break;
    default:
        break;
    }
    made = PyObject_Vectorcall(callable, arguments, flags, names);
    if (made != NULL && cache->type == NULL && cache->num_tries < 8 && PyType_Check(callable) && strcmp(Py_TYPE(callable)->tp_name, "msgspec._core.StructMeta") == 0
        && Py_IS_TYPE(made, (PyTypeObject *)callable)) {
        cache->num_tries++;
        learn_struct(cache, (PyTypeObject *)callable, made, arguments, PyVectorcall_NARGS(flags), names);
    }
    return made;
}

static inline PyObject *called(PyObject *callable, PyObject *const *arguments, size_t flags, PyObject *names,
                               struct_cache *cache) {
    PyTypeObject *type = cache->type;
    if (likely((PyObject *)type != callable || type == NULL)) {
        return call_missed(callable, arguments, flags, names, cache);
    }
    Py_ssize_t num_given = PyVectorcall_NARGS(flags) + (names == NULL ? 0 : PyTuple_GET_SIZE(names));
    if (unlikely(type->tp_version_tag != cache->version || names != cache->names || num_given != cache->num_given)) {
        return PyObject_Vectorcall(callable, arguments, flags, names);
    }
    PyObject *made = struct_of(type, cache->pool);
    if (unlikely(made == NULL)) {
        return NULL;
    }
    for (Py_ssize_t i = 0; i < num_given; i++) {
        *(PyObject **)((char *)made + cache->offset[i]) = Py_NewRef(arguments[i]);
    }
    for (Py_ssize_t i = num_given; i < cache->num_fields; i++) {
        *(PyObject **)((char *)made + cache->offset[i]) = Py_NewRef(cache->value[i]);
    }
    return made;
}

#define PyObject_Vectorcall(callable, arguments, flags, names) \
    ({ static struct_cache cache_; called(callable, arguments, flags, names, &cache_); })

#endif
