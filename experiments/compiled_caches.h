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

/* ---- structs of msgspec's that the collector of cycles does not look at ------------------------------------------- */

#define MOST_FIELDS 32

typedef struct {
    PyTypeObject *type; /* NULL: nothing known yet */
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

/* ---- heapq's functions on lists of tuples that begin with numbers -------------------------------------------------- */

/* As heapq has it in C, with the comparisons of tuples and of integers done here. Any other comparison is Python's. */

static inline int integer_order(PyObject *a, PyObject *b) { /* below 0, 0 or above 0 */
#if PY_VERSION_HEX < 0x030C0000
    Py_ssize_t size = Py_SIZE(a);
    if (size != Py_SIZE(b)) {
        return size < Py_SIZE(b) ? -1 : 1;
    }
    for (Py_ssize_t i = Py_ABS(size); --i >= 0;) {
        digit x = ((PyLongObject *)a)->ob_digit[i], y = ((PyLongObject *)b)->ob_digit[i];
        if (x != y) {
            return (x < y) == (size > 0) ? -1 : 1;
        }
    }
    return 0;
#else
    int overflow_a, overflow_b;
    long long x = PyLong_AsLongLongAndOverflow(a, &overflow_a), y = PyLong_AsLongLongAndOverflow(b, &overflow_b);
    if (overflow_a || overflow_b) {
        return PyObject_RichCompareBool(a, b, Py_LT) ? -1 : PyObject_RichCompareBool(b, a, Py_LT);
    }
    return x < y ? -1 : x > y;
#endif
}

static int entry_is_less(PyObject *a, PyObject *b) { /* -1: an exception */
    Py_ssize_t size = Py_MIN(PyTuple_GET_SIZE(a), PyTuple_GET_SIZE(b));
    for (Py_ssize_t i = 0; i < size; i++) {
        PyObject *x = PyTuple_GET_ITEM(a, i), *y = PyTuple_GET_ITEM(b, i);
        if (x == y) {
            continue;
        }
        if (PyLong_CheckExact(x) && PyLong_CheckExact(y)) {
            int order = integer_order(x, y);
            if (order != 0) {
                return order < 0;
            }
            continue;
        }
        int is_equal = PyObject_RichCompareBool(x, y, Py_EQ);
        if (is_equal != 1) {
            return is_equal < 0 ? -1 : PyObject_RichCompareBool(x, y, Py_LT);
        }
    }
    return PyTuple_GET_SIZE(a) < PyTuple_GET_SIZE(b);
}

/* What no integer decides is asked of Python, which may change the heap: hence references of our own. */
static int heap_asks(PyListObject *heap, Py_ssize_t size, PyObject *a, PyObject *b) {
    Py_INCREF(a);
    Py_INCREF(b);
    int is_less = PyTuple_CheckExact(a) && PyTuple_CheckExact(b) ? entry_is_less(a, b) : PyObject_RichCompareBool(a, b, Py_LT);
    Py_DECREF(a);
    Py_DECREF(b);
    if (is_less >= 0 && Py_SIZE(heap) != size) {
        PyErr_SetString(PyExc_RuntimeError, "list changed size during iteration");
        return -1;
    }
    return is_less;
}

static inline int heap_is_less(PyListObject *heap, Py_ssize_t size, PyObject *a, PyObject *b) {
    if (PyTuple_CheckExact(a) && PyTuple_CheckExact(b) && PyTuple_GET_SIZE(a) > 0 && PyTuple_GET_SIZE(b) > 0) {
        PyObject *x = PyTuple_GET_ITEM(a, 0), *y = PyTuple_GET_ITEM(b, 0);
        if (PyLong_CheckExact(x) && PyLong_CheckExact(y)) {
            int order = integer_order(x, y);
            if (order != 0) {
                return order < 0;
            }
        }
    }
    return heap_asks(heap, size, a, b);
}

static int heap_sift_down(PyListObject *heap, Py_ssize_t start, Py_ssize_t at) {
    Py_ssize_t size = Py_SIZE(heap);
    while (at > start) {
        Py_ssize_t parent = (at - 1) >> 1;
        int is_less = heap_is_less(heap, size, heap->ob_item[at], heap->ob_item[parent]);
        if (is_less <= 0) {
            return is_less;
        }
        PyObject **items = heap->ob_item, *item = items[at];
        items[at] = items[parent];
        items[parent] = item;
        at = parent;
    }
    return 0;
}

static int heap_sift_up(PyListObject *heap) {
    Py_ssize_t size = Py_SIZE(heap), at = 0;
    while (at < size >> 1) {
        Py_ssize_t child = 2 * at + 1;
        if (child + 1 < size) {
            int is_less = heap_is_less(heap, size, heap->ob_item[child], heap->ob_item[child + 1]);
            if (is_less < 0) {
                return -1;
            }
            child += !is_less;
        }
        PyObject **items = heap->ob_item, *item = items[child];
        items[child] = items[at];
        items[at] = item;
        at = child;
    }
    return heap_sift_down(heap, 0, at);
}

static PyObject *heap_push(PyObject *heap, PyObject *item) {
    if (PyList_Append(heap, item) < 0 || heap_sift_down((PyListObject *)heap, 0, PyList_GET_SIZE(heap) - 1) < 0) {
        return NULL;
    }
    return Py_NewRef(Py_None);
}

static PyObject *heap_pop(PyObject *heap) { /* of a heap that is not empty */
    Py_ssize_t last = PyList_GET_SIZE(heap) - 1;
    PyObject *item = Py_NewRef(PyList_GET_ITEM(heap, last));
    if (PyList_SetSlice(heap, last, last + 1, NULL) < 0) {
        Py_DECREF(item);
        return NULL;
    }
    if (last == 0) {
        return item;
    }
    PyObject *least = PyList_GET_ITEM(heap, 0);
    PyList_SET_ITEM(heap, 0, item);
    if (heap_sift_up((PyListObject *)heap) < 0) {
        Py_DECREF(least);
        return NULL;
    }
    return least;
}

/* ---- bisect's functions on a tuple or list of integers ------------------------------------------------------------ */

/* The place of `item`, behind those equal to it if `is_right`; -1: not only integers, or an exception. */
static Py_ssize_t place_among_integers(PyObject *items, PyObject *item, int is_right) {
    if (!(PyTuple_CheckExact(items) || PyList_CheckExact(items)) || !PyLong_CheckExact(item)) {
        return -1;
    }
    PyObject **all = PySequence_Fast_ITEMS(items); /* integers are compared without calling anything that may change it */
    Py_ssize_t low = 0, high = PySequence_Fast_GET_SIZE(items);
    while (low < high) {
        Py_ssize_t middle = (low + high) >> 1;
        if (!PyLong_CheckExact(all[middle])) {
            return -1;
        }
        if (is_right ? integer_order(item, all[middle]) < 0 : integer_order(all[middle], item) >= 0) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

/* ---- calls ---------------------------------------------------------------------------------------------------------- */

static PyObject *heappush_, *heappop_, *bisect_left_, *bisect_right_; /* as Python knows them */

static PyObject *function_of(const char *module_name, const char *name) {
    PyObject *function = NULL, *module = PyImport_ImportModule(module_name);
    if (module != NULL) {
        function = PyObject_GetAttrString(module, name);
        Py_DECREF(module);
    }
    PyErr_Clear();
    return function;
}

static void find_functions(void) {
    static int is_sought = 0;
    if (!is_sought) {
        is_sought = 1;
        heappush_ = function_of("_heapq", "heappush");
        heappop_ = function_of("_heapq", "heappop");
        bisect_left_ = function_of("_bisect", "bisect_left");
        bisect_right_ = function_of("_bisect", "bisect_right");
    }
}

static PyObject *call_missed(PyObject *callable, PyObject *const *arguments, size_t flags, PyObject *names,
                             struct_cache *cache) {
    if (PyCFunction_CheckExact(callable) && names == NULL) {
        Py_ssize_t number = PyVectorcall_NARGS(flags);
        find_functions();
        if (callable == heappush_ && number == 2 && PyList_CheckExact(arguments[0])) {
            return heap_push(arguments[0], arguments[1]);
        }
        if (callable == heappop_ && number == 1 && PyList_CheckExact(arguments[0]) && PyList_GET_SIZE(arguments[0]) > 0) {
            return heap_pop(arguments[0]);
        }
        if ((callable == bisect_left_ || callable == bisect_right_) && number == 2) {
            Py_ssize_t place = place_among_integers(arguments[0], arguments[1], callable == bisect_right_);
            if (place >= 0) {
                return PyLong_FromSsize_t(place);
            }
        }
    }
    PyObject *made = PyObject_Vectorcall(callable, arguments, flags, names);
    if (made != NULL && cache->type == NULL && PyType_Check(callable) && strcmp(Py_TYPE(callable)->tp_name, "msgspec._core.StructMeta") == 0
        && Py_IS_TYPE(made, (PyTypeObject *)callable)) {
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
    PyObject *made = _PyObject_New(type);
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
