/* Integers of compiled code as Python's objects, and Python's as C's: see compiled_caches.h, which includes this. */

/* ---- integers that were made last ---------------------------------------------------------------------------------- */

/* An instant goes through many hands, and so does a request's id: where one is wanted as an object, mostly it was made an
 * object a moment ago. The last of each place is kept. */

#define BOX_BITS 10

static struct {
    Py_ssize_t value;
    PyObject *object;
} boxes[1 << BOX_BITS] = {{1, NULL}}; /* no value is at its own place yet: that of 0 is the first, that of 1 another */

static CPy_NOINLINE PyObject *boxed_anew(Py_ssize_t value, size_t place) {
#if PY_VERSION_HEX < 0x030C0000
    PyObject *kept = boxes[place].object;
    if (kept != NULL && Py_REFCNT(kept) == 1 && Py_SIZE(kept) == 2 && value >> PyLong_SHIFT > 0
        && value >> 2 * PyLong_SHIFT == 0) { /* nobody else has it any more, and it is as large: it becomes the new one */
        digit *digits = ((PyLongObject *)kept)->ob_digit;
        digits[0] = (digit)(value & PyLong_MASK);
        digits[1] = (digit)(value >> PyLong_SHIFT);
        boxes[place].value = value;
        return Py_NewRef(kept);
    }
#endif
    PyObject *object = PyLong_FromSsize_t(value);
    if (object == NULL) {
        CPyError_OutOfMemory();
    }
    PyObject *before = boxes[place].object;
    boxes[place].value = value;
    boxes[place].object = Py_NewRef(object);
    Py_XDECREF(before);
    return object;
}

static inline PyObject *boxed(CPyTagged number) { /* takes over a reference */
    if (unlikely(CPyTagged_CheckLong(number))) {
        return CPyTagged_LongAsObject(number);
    }
    Py_ssize_t value = CPyTagged_ShortAsSsize_t(number);
    size_t place = (size_t)value * (size_t)0x9E3779B97F4A7C15 >> (64 - BOX_BITS);
    if (likely(boxes[place].value == value)) {
        return Py_NewRef(boxes[place].object);
    }
    return boxed_anew(value, place);
}

#define CPyTagged_StealAsObject(number) boxed(number)

/* ---- products: the library asks Python as soon as one may be too large --------------------------------------------- */

static inline CPyTagged product_of(CPyTagged left, CPyTagged right) {
    Py_ssize_t product;
    if (likely(CPyTagged_CheckShort(left) && CPyTagged_CheckShort(right)
               && !__builtin_mul_overflow((Py_ssize_t)left, CPyTagged_ShortAsSsize_t(right), &product))) {
        return (CPyTagged)product;
    }
    return CPyTagged_Multiply_(left, right);
}

#define CPyTagged_Multiply(left, right) product_of(left, right)

/* ---- comparisons of what may be an integer -------------------------------------------------------------------------- */

static inline int integer_order(PyObject *a, PyObject *b) { /* below 0, 0 or above 0 */
#if PY_VERSION_HEX < 0x030C0000
    Py_ssize_t size = Py_SIZE(a);
    if (size == 2 && Py_SIZE(b) == 2) { /* as instants are */
        digit *x = ((PyLongObject *)a)->ob_digit, *y = ((PyLongObject *)b)->ob_digit;
        uint64_t left = (uint64_t)x[1] << PyLong_SHIFT | x[0], right = (uint64_t)y[1] << PyLong_SHIFT | y[0];
        return left < right ? -1 : left > right;
    }
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

static inline PyObject *comparison_of(PyObject *a, PyObject *b, int how) {
    if (PyLong_CheckExact(a) && PyLong_CheckExact(b)) {
        int order = integer_order(a, b), is_so = 0;
        switch (how) {
        case Py_LT: is_so = order < 0; break;
        case Py_LE: is_so = order <= 0; break;
        case Py_EQ: is_so = order == 0; break;
        case Py_NE: is_so = order != 0; break;
        case Py_GT: is_so = order > 0; break;
        case Py_GE: is_so = order >= 0; break;
        }
        return Py_NewRef(is_so ? Py_True : Py_False);
    }
    return PyObject_RichCompare(a, b, how);
}

#define PyObject_RichCompare(a, b, how) comparison_of(a, b, how)

static inline int is_true(PyObject *object) {
    return object == Py_True ? 1 : object == Py_False || object == Py_None ? 0 : PyObject_IsTrue(object);
}

#define PyObject_IsTrue(object) is_true(object)

/* ---- items of a list, or of what is a list, at an integer ------------------------------------------------------------- */

typedef struct {
    PyTypeObject *type; /* a list, or reads its items as a list does */
    unsigned int version;
} list_cache;

static PyObject *item_missed(PyObject *object, PyObject *key, list_cache *cache) {
    PyTypeObject *type = Py_TYPE(object);
    PyObject *name = PyList_Check(object) ? PyUnicode_InternFromString("__getitem__") : NULL;
    if (name != NULL) {
        PyObject *found = _PyType_Lookup(type, name);
        if (found != NULL && found == _PyType_Lookup(&PyList_Type, name) && type->tp_version_tag != 0) {
            cache->type = type;
            cache->version = type->tp_version_tag;
            if (type->tp_flags & Py_TPFLAGS_HEAPTYPE) { /* a class of Python's, for which Python would look the method up */
                type->tp_as_mapping->mp_subscript = PyList_Type.tp_as_mapping->mp_subscript;
            }
        }
        Py_DECREF(name);
    }
    PyErr_Clear();
    return PyObject_GetItem(object, key);
}

static inline PyObject *item_of(PyObject *object, PyObject *key, list_cache *cache) {
    if (Py_TYPE(object) == cache->type && cache->type->tp_version_tag == cache->version && PyLong_CheckExact(key)) {
        Py_ssize_t place = PyLong_AsSsize_t(key);
        if (likely(place >= 0 && place < PyList_GET_SIZE(object))) {
            return Py_NewRef(PyList_GET_ITEM(object, place));
        }
        PyErr_Clear();
    }
    return item_missed(object, key, cache);
}

#define PyObject_GetItem(object, key) ({ static list_cache cache_; item_of(object, key, &cache_); })

/* ---- dictionaries looked up by an integer, whose hash it is ------------------------------------------------------------- */

/* Borrowed; NULL, with or without an exception, where it is not there. */
static inline PyObject *value_in(PyObject *dict, PyObject *key) {
#if PY_VERSION_HEX < 0x030C0000
    if (PyLong_CheckExact(key)) {
        Py_ssize_t size = Py_SIZE(key);
        if (size == 1 || size == 2) {
            digit *digits = ((PyLongObject *)key)->ob_digit;
            Py_hash_t hash = size == 1 ? (Py_hash_t)digits[0] : (Py_hash_t)digits[0] | (Py_hash_t)digits[1] << PyLong_SHIFT;
            return _PyDict_GetItem_KnownHash(dict, key, hash); /* below 2^60, and so below the modulus of hashes */
        }
    }
#endif
    return PyDict_GetItemWithError(dict, key);
}

static inline PyObject *item_in(PyObject *dict, PyObject *key) {
    if (unlikely(!PyDict_CheckExact(dict))) {
        return CPyDict_GetItem(dict, key);
    }
    PyObject *value = value_in(dict, key);
    if (unlikely(value == NULL)) {
        if (!PyErr_Occurred()) {
            PyErr_SetObject(PyExc_KeyError, key);
        }
        return NULL;
    }
    return Py_NewRef(value);
}

static inline PyObject *item_or_none(PyObject *dict, PyObject *key) {
    if (unlikely(!PyDict_CheckExact(dict))) {
        return CPyDict_GetWithNone(dict, key);
    }
    PyObject *value = value_in(dict, key);
    if (value == NULL) {
        if (PyErr_Occurred()) {
            return NULL;
        }
        value = Py_None;
    }
    return Py_NewRef(value);
}

#define CPyDict_GetItem(dict, key) item_in(dict, key)
#define CPyDict_GetWithNone(dict, key) item_or_none(dict, key)
