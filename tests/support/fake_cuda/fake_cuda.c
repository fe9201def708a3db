/* A stand-in for libcuda: "device memory" is a memfd for each allocation.
 *
 * Its public address is mapped without any right, so that a host that touches device memory ends by SIGSEGV, as
 * on a GPU; the functions here copy by a second, private mapping.  Other processes open an allocation through
 * /proc/PID/fd, so handles work between processes, and end with the process that exports.
 *
 * A process that is killed leaves what it had open counted as open.
 *
 * Each argument is checked; what the driver answers with undefined behaviour is an error here, and counted
 * (fake_misuses).  FAKE_CUDA_* variables, read at each call, make it refuse:
 *   FAKE_CUDA_IPC=refuse        no handles and no descriptors (asynchronous pools)
 *   FAKE_CUDA_IPC=reserved      cuMemGetAddressRange tells the whole reserved range of mapped memory
 *   FAKE_CUDA_IPC=refuse-open   handles that nobody can open (another container)
 *   FAKE_CUDA_REGISTER=refuse   memory of the host is not pinned
 *   FAKE_CUDA_DEVICES=N         number of devices of the machine (1); CUDA_VISIBLE_DEVICES=1,0 chooses
 *   FAKE_CUDA_UUID=TEXT         first bytes of the devices' UUIDs: other text, other GPUs
 *   FAKE_CUDA_LOG=PATH          a line for each call that changes something, waits or fails:
 *                               PID FUNCTION RESULT ADDRESS SIZE
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

typedef int CUresult;
typedef unsigned long long u64;
typedef struct { unsigned char bytes[16]; } Uuid;
typedef struct { unsigned char bytes[64]; } IpcHandle;
typedef struct { int location_type, location_id, flags; } Access;
typedef struct { int device, retained; } Context;

enum {
    SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201, MAP_FAILED_ = 205, ALREADY_MAPPED = 208, INVALID_HANDLE = 400,
    NOT_FOUND = 500, ALREADY_REGISTERED = 712, NOT_REGISTERED = 713, NOT_PERMITTED = 800
};
enum { MOST = 1024, MOST_DEVICES = 16, DEEPEST = 32, PAGE = 4096, MAGIC = 0x46414B45 };
enum { FREE, ALLOCATED, MANAGED, OPENED, RESERVED, MAPPED };

/* The first page of each memfd, shared by all that have it open. */
typedef struct { unsigned magic; int device; u64 size; int open, freed; char uuid[16]; } Header;

typedef struct {
    int kind, device, fd, readable;
    u64 address, size, buffer;
    char *view;          /* private mapping of the data */
    int part;            /* of mapped memory: its CUmemGenericAllocationHandle */
    Header *header;
    dev_t file_device; ino_t file;
} Range;

/* CUmemGenericAllocationHandle: memory that is mapped by parts.  It lives as long as somebody holds it, in any
 * process, so freeing early is no error. */
typedef struct { int used, fd, mappings; u64 size; } Part;
typedef struct { u64 address, size; } Pinned;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Range ranges[MOST];
static Part parts[MOST];
static Pinned pinned[MOST];
static int most_ranges, most_pinned;  /* as many were ever used */
static Context contexts[MOST_DEVICES];
static __thread Context *stack[DEEPEST];
static __thread int depth;
/* Whether this process has started the driver, and whether one that it was forked from has.  Not asked by getpid(),
 * which takes longer than a driver's call. */
static int started, is_child;
static u64 last_buffer;
static int misuses;

#define API __attribute__((visibility("default"))) CUresult
#define LOCKED pthread_mutex_lock(&lock)
#define UNLOCKED pthread_mutex_unlock(&lock)

static int is(const char *variable, const char *value) {
    const char *found = getenv(variable);
    return found && !strcmp(found, value);
}

static CUresult told(const char *function, CUresult result, u64 address, u64 size) {
    const char *path = getenv("FAKE_CUDA_LOG");
    if (path && *path) {
        char line[256];
        int length = snprintf(line, sizeof line, "%d %s %d %llu %llu\n", getpid(), function, result, address, size);
        int fd = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
        if (fd >= 0) {
            if (write(fd, line, length) < 0) misuses++;
            close(fd);
        }
    }
    return result;
}

/* What a GPU would leave undefined. */
static CUresult misused(const char *function, CUresult result, u64 address, u64 size) {
    misuses++;
    return told(function, result, address, size);
}

/* The machine's number of a device of this process; -1: there is no such device. */
static int physical(int ordinal) {
    const char *devices = getenv("FAKE_CUDA_DEVICES"), *visible = getenv("CUDA_VISIBLE_DEVICES");
    int count = devices ? atoi(devices) : 1;
    if (count > MOST_DEVICES) count = MOST_DEVICES;
    if (!visible) return ordinal >= 0 && ordinal < count ? ordinal : -1;
    for (; *visible >= '0' && *visible <= '9'; visible++) {
        char *end;
        long number = strtol(visible, &end, 10);
        if (number >= count) return -1;
        if (!ordinal--) return (int)number;
        if (*(visible = end) != ',') return -1;
    }
    return -1;
}

static int devices(void) {
    int count = 0;
    while (count < MOST_DEVICES && physical(count) >= 0) count++;
    return count;
}

static void uuid_of(int device, char *uuid) {
    const char *text = getenv("FAKE_CUDA_UUID");
    memset(uuid, 0, 16);
    memcpy(uuid, text ? text : "stand-in", strnlen(text ? text : "stand-in", 15));
    uuid[15] = (char)(physical(device) + 1);
}

/* A child of a process that has started the driver cannot use it. */
static void in_child(void) { is_child |= started; started = 0; }
__attribute__((constructor)) static void at_load(void) { pthread_atfork(NULL, NULL, in_child); }
static int is_started(void) { return started; }
static Context *current(void) { return depth ? stack[depth - 1] : NULL; }

#define CHECK_STARTED if (!is_started()) return NOT_INITIALIZED
#define CHECK_CONTEXT(name) CHECK_STARTED; if (!current()) return misused(name, INVALID_CONTEXT, 0, 0)

/* The range that has all of size bytes at an address; NULL: there is none.  Reserved ranges have none. */
static Range *range_of(u64 address, u64 size, int is_reserved) {
    for (int i = 0; i < most_ranges; i++)
        if (ranges[i].kind && (ranges[i].kind == RESERVED) == is_reserved && address >= ranges[i].address && address - ranges[i].address < ranges[i].size
            && size <= ranges[i].size - (address - ranges[i].address))
            return &ranges[i];
    return NULL;
}

static Range *range_at(u64 address, u64 size) { return range_of(address, size, 0); }

/* The first of the ranges that have all of size bytes at an address: one, or parts side by side. */
static Range *ranges_at(u64 address, u64 size) {
    Range *first = range_at(address, 0);
    u64 end = address + size;
    for (Range *next = first; next && next->address + next->size < end;) {
        u64 at = next->address + next->size;
        next = next->kind == MAPPED ? range_at(at, 0) : NULL;
        if (!next || next->kind != MAPPED || next->device != first->device || !next->readable) return NULL;
    }
    return first;
}

static Range *new_range(void) {
    for (int i = 0; i < MOST; i++)
        if (!ranges[i].kind) {
            memset(&ranges[i], 0, sizeof ranges[i]);
            ranges[i].fd = -1;
            if (i >= most_ranges) most_ranges = i + 1;
            return &ranges[i];
        }
    return NULL;
}

static u64 padded(u64 size) { return (size + PAGE - 1) & ~(u64)(PAGE - 1); }

/* Maps a memfd for the functions here, and an address without rights for the public. */
static int map_range(Range *range, int fd, u64 address) {
    struct stat found;
    if (fstat(fd, &found) || (u64)found.st_size < PAGE) return 0;
    Header *header = mmap(NULL, found.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (header == MAP_FAILED) return 0;
    if (header->magic != MAGIC) { munmap(header, found.st_size); return 0; }
    if (!address) {
        void *at = mmap(NULL, padded(header->size), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (at == MAP_FAILED) { munmap(header, found.st_size); return 0; }
        address = (u64)(uintptr_t)at;
    }
    range->header = header;
    range->view = (char *)header + PAGE;
    range->address = address;
    range->size = header->size;
    range->file_device = found.st_dev;
    range->file = found.st_ino;
    return 1;
}

static void drop_range(Range *range, int keep_address) {
    if (range->header) munmap(range->header, PAGE + padded(range->header->size));
    if (!keep_address) munmap((void *)(uintptr_t)range->address, padded(range->size));
    if (range->fd >= 0) close(range->fd);
    range->kind = FREE;
}

/* --- start, devices, contexts --- */

API cuInit(unsigned flags) {
    if (flags) return INVALID_VALUE;
    if (is_child) return NOT_INITIALIZED;
    started = 1;
    for (int i = 0; i < MOST_DEVICES; i++) contexts[i].device = i;
    return told("cuInit", SUCCESS, 0, 0);
}

API cuGetErrorName(CUresult code, const char **name) {
    static const struct { int code; const char *name; } names[] = {
        {0, "CUDA_SUCCESS"}, {1, "CUDA_ERROR_INVALID_VALUE"}, {2, "CUDA_ERROR_OUT_OF_MEMORY"},
        {3, "CUDA_ERROR_NOT_INITIALIZED"}, {101, "CUDA_ERROR_INVALID_DEVICE"},
        {201, "CUDA_ERROR_INVALID_CONTEXT"}, {205, "CUDA_ERROR_MAP_FAILED"},
        {208, "CUDA_ERROR_ALREADY_MAPPED"}, {400, "CUDA_ERROR_INVALID_HANDLE"},
        {500, "CUDA_ERROR_NOT_FOUND"},
        {712, "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"}, {713, "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED"},
        {800, "CUDA_ERROR_NOT_PERMITTED"},
    };
    for (unsigned i = 0; i < sizeof names / sizeof *names; i++)
        if (names[i].code == code) { *name = names[i].name; return SUCCESS; }
    *name = NULL;
    return INVALID_VALUE;
}

API cuDeviceGetCount(int *count) {
    CHECK_STARTED;
    if (!count) return INVALID_VALUE;
    *count = devices();
    return SUCCESS;
}

/* A CUdevice is not its ordinal here, so that whoever takes one for the other is found out. */
enum { DEVICE_HANDLES = 40 };
static int is_device(int handle) { return handle >= DEVICE_HANDLES && handle < DEVICE_HANDLES + devices(); }

API cuDeviceGet(int *device, int ordinal) {
    CHECK_STARTED;
    if (!device) return INVALID_VALUE;
    if (ordinal < 0 || ordinal >= devices()) return told("cuDeviceGet", INVALID_DEVICE, 0, 0);
    *device = DEVICE_HANDLES + ordinal;
    return SUCCESS;
}

API cuDeviceGetUuid_v2(Uuid *uuid, int device) {
    CHECK_STARTED;
    if (!uuid) return INVALID_VALUE;
    if (!is_device(device)) return misused("cuDeviceGetUuid_v2", INVALID_DEVICE, 0, 0);
    uuid_of(device - DEVICE_HANDLES, (char *)uuid->bytes);
    return SUCCESS;
}

API cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    CHECK_STARTED;
    if (!flags || !active) return INVALID_VALUE;
    if (!is_device(device)) return misused("cuDevicePrimaryCtxGetState", INVALID_DEVICE, 0, 0);
    *flags = 0;
    *active = contexts[device - DEVICE_HANDLES].retained > 0;
    return SUCCESS;
}

API cuDevicePrimaryCtxRetain(Context **context, int device) {
    CHECK_STARTED;
    if (!context) return INVALID_VALUE;
    if (!is_device(device)) return misused("cuDevicePrimaryCtxRetain", INVALID_DEVICE, 0, 0);
    *context = &contexts[device - DEVICE_HANDLES];
    LOCKED;
    (*context)->retained++;
    UNLOCKED;
    return told("cuDevicePrimaryCtxRetain", SUCCESS, 0, 0);
}

API cuDevicePrimaryCtxReset_v2(int device) {
    CHECK_STARTED;
    if (!is_device(device)) return INVALID_DEVICE;
    contexts[device - DEVICE_HANDLES].retained = 0;
    return SUCCESS;
}

API cuCtxPushCurrent_v2(Context *context) {
    CHECK_STARTED;
    if (context < contexts || context >= contexts + MOST_DEVICES || !context->retained)
        return told("cuCtxPushCurrent_v2", INVALID_CONTEXT, 0, 0);
    if (depth == DEEPEST) return misused("cuCtxPushCurrent_v2", INVALID_VALUE, 0, 0);
    stack[depth++] = context;
    return SUCCESS;
}

API cuCtxPopCurrent_v2(Context **context) {
    CHECK_STARTED;
    if (!depth) return misused("cuCtxPopCurrent_v2", INVALID_CONTEXT, 0, 0);
    depth--;
    if (context) *context = stack[depth];
    return SUCCESS;
}

API cuCtxSynchronize(void) {
    CHECK_CONTEXT("cuCtxSynchronize");
    return told("cuCtxSynchronize", SUCCESS, current()->device, 0);
}

API cuStreamSynchronize(void *stream) {
    CHECK_CONTEXT("cuStreamSynchronize");
    if (stream) return misused("cuStreamSynchronize", INVALID_HANDLE, 0, 0);
    return told("cuStreamSynchronize", SUCCESS, current()->device, 0);
}

/* --- memory --- */

static CUresult allocate(u64 *address, u64 size, int kind) {
    LOCKED;
    Range *range = new_range();
    int fd = memfd_create("fake-cuda", MFD_CLOEXEC);
    if (!range || fd < 0 || ftruncate(fd, PAGE + padded(size))) {
        if (fd >= 0) close(fd);
        UNLOCKED;
        return OUT_OF_MEMORY;
    }
    Header made = {.magic = MAGIC, .device = current()->device, .size = size};
    uuid_of(made.device, made.uuid);
    if (pwrite(fd, &made, sizeof made, 0) != sizeof made || !map_range(range, fd, 0)) {
        close(fd);
        UNLOCKED;
        return OUT_OF_MEMORY;
    }
    if (kind == MANAGED) mprotect((void *)(uintptr_t)range->address, padded(size), PROT_READ | PROT_WRITE);
    range->fd = fd;
    range->kind = kind;
    range->device = made.device;
    range->readable = 1;
    range->buffer = ++last_buffer;
    *address = range->address;
    UNLOCKED;
    return told("cuMemAlloc_v2", SUCCESS, *address, size);
}

API cuMemAlloc_v2(u64 *address, size_t size) {
    CHECK_CONTEXT("cuMemAlloc_v2");
    return address && size ? allocate(address, size, ALLOCATED) : INVALID_VALUE;
}

API cuMemAllocManaged(u64 *address, size_t size, unsigned flags) {
    CHECK_CONTEXT("cuMemAllocManaged");
    return address && size && flags ? allocate(address, size, MANAGED) : INVALID_VALUE;
}

/* Freed while another process has it open: undefined on a GPU, and counted. */
API cuMemFree_v2(u64 address) {
    CHECK_CONTEXT("cuMemFree_v2");
    LOCKED;
    Range *range = range_at(address, 0);
    if (!range || range->address != address || (range->kind != ALLOCATED && range->kind != MANAGED)) {
        UNLOCKED;
        return misused("cuMemFree_v2", INVALID_VALUE, address, 0);
    }
    int others = range->header->open;
    range->header->freed = 1;
    drop_range(range, 0);
    UNLOCKED;
    if (others > 0) misused("freed-while-open", SUCCESS, address, others);
    return told("cuMemFree_v2", SUCCESS, address, 0);
}

/* An address that the driver does not know has zeros. */
API cuPointerGetAttributes(unsigned count, int *attributes, void **data, u64 address) {
    static const char name[] = "cuPointerGetAttributes";
    CHECK_CONTEXT(name);
    if (!count || !attributes || !data) return misused(name, INVALID_VALUE, address, 0);
    LOCKED;
    Range *range = range_at(address, 0);
    int is_pinned = 0;
    for (int i = 0; i < most_pinned && !range; i++)
        is_pinned |= pinned[i].size && address >= pinned[i].address && address - pinned[i].address < pinned[i].size;
    CUresult result = SUCCESS;
    for (unsigned i = 0; i < count; i++)
        switch (attributes[i]) {
        case 2: *(int *)data[i] = range ? 2 : is_pinned; break;
        case 7: *(u64 *)data[i] = range ? range->buffer : 0; break;
        case 8: *(unsigned char *)data[i] = range && range->kind == MANAGED; break;
        case 9: *(int *)data[i] = range ? range->device : is_pinned ? 0 : -2; break;
        default: result = INVALID_VALUE;
        }
    UNLOCKED;
    return result;
}

/* Unlike the function above, this one refuses an address that the driver does not know. */
API cuPointerGetAttribute(void *data, int attribute, u64 address) {
    static const char name[] = "cuPointerGetAttribute";
    CHECK_CONTEXT(name);
    if (!data || attribute != 7) return misused(name, INVALID_VALUE, address, 0);
    LOCKED;
    Range *range = range_at(address, 0);
    int good = range && range->kind != RESERVED;
    if (good) *(u64 *)data = range->buffer;
    UNLOCKED;
    return good ? SUCCESS : told(name, INVALID_VALUE, address, 0);
}

API cuMemGetAddressRange_v2(u64 *base, size_t *size, u64 address) {
    CHECK_CONTEXT("cuMemGetAddressRange_v2");
    LOCKED;
    Range *range = range_at(address, 0);
    if (range && range->kind == MAPPED && is("FAKE_CUDA_IPC", "reserved")) range = range_of(address, 0, 1);
    if (range) {
        if (base) *base = range->address;
        if (size) *size = range->size;
    }
    UNLOCKED;
    return range ? SUCCESS : NOT_FOUND;
}

/* Where the functions here have bytes of a range. */
static char *view_of(Range *range, u64 address) {
    return (range->kind == MANAGED ? (char *)(uintptr_t)range->address : range->view) + (address - range->address);
}

/* Where bytes on the current device are; NULL: they are not all in one allocation of it. */
static char *device_bytes(u64 address, u64 size) {
    LOCKED;
    Range *range = ranges_at(address, size);
    int good = range && range->readable && range->device == current()->device && !range->header->freed;
    char *found = good ? view_of(range, address) : NULL;
    UNLOCKED;
    return found;
}

/* Whether an address is mapped memory of the host, and no device's. */
static int is_host(const void *at, u64 size) {
    u64 first = (u64)(uintptr_t)at & ~(u64)(PAGE - 1), end = (u64)(uintptr_t)at + size;
    static unsigned char found[1 << 16];
    int good = at != NULL;
    LOCKED;
    for (u64 part = first; good && part < end; part += (u64)PAGE << 16)
        good = !mincore((void *)(uintptr_t)part, end - part < (u64)PAGE << 16 ? end - part : (u64)PAGE << 16, found);
    Range *range = good ? range_at((u64)(uintptr_t)at, 0) : NULL;
    if (range && range->kind != MANAGED) good = 0;
    UNLOCKED;
    return good;
}

API cuMemcpyDtoH_v2(void *target, u64 source, size_t size) {
    CHECK_CONTEXT("cuMemcpyDtoH_v2");
    char *from = device_bytes(source, size);
    if (!from || !is_host(target, size)) return misused("cuMemcpyDtoH_v2", INVALID_VALUE, source, size);
    memcpy(target, from, size);
    return told("cuMemcpyDtoH_v2", SUCCESS, source, size);
}

API cuMemcpyHtoD_v2(u64 target, const void *source, size_t size) {
    CHECK_CONTEXT("cuMemcpyHtoD_v2");
    char *to = device_bytes(target, size);
    if (!to || !is_host(source, size)) return misused("cuMemcpyHtoD_v2", INVALID_VALUE, target, size);
    memcpy(to, source, size);
    return told("cuMemcpyHtoD_v2", SUCCESS, target, size);
}

API cuMemcpyDtoD_v2(u64 target, u64 source, size_t size) {
    CHECK_CONTEXT("cuMemcpyDtoD_v2");
    char *to = device_bytes(target, size), *from = device_bytes(source, size);
    if (!to || !from) return misused("cuMemcpyDtoD_v2", INVALID_VALUE, target, size);
    memmove(to, from, size);
    return told("cuMemcpyDtoD_v2", SUCCESS, target, size);
}

/* --- handles for other processes --- */

typedef struct { unsigned magic; int pid, fd, device; u64 size; char uuid[16]; } Packed;

API cuIpcGetMemHandle(IpcHandle *handle, u64 address) {
    CHECK_CONTEXT("cuIpcGetMemHandle");
    LOCKED;
    Range *range = range_at(address, 0);
    if (is("FAKE_CUDA_IPC", "refuse") || !handle || (range && range->kind == MAPPED)) {
        UNLOCKED;
        return told("cuIpcGetMemHandle", INVALID_VALUE, address, 0);
    }
    Packed packed = {.magic = MAGIC, .pid = getpid()};
    int good = range && range->address == address && range->kind == ALLOCATED && range->device == current()->device;
    if (good) {
        packed.fd = range->fd;
        packed.device = range->device;
        packed.size = range->size;
        memcpy(packed.uuid, range->header->uuid, 16);
        memset(handle, 0, sizeof *handle);
        memcpy(handle, &packed, sizeof packed);
    }
    UNLOCKED;
    return good ? told("cuIpcGetMemHandle", SUCCESS, address, 0) : misused("cuIpcGetMemHandle", INVALID_VALUE, address, 0);
}

API cuIpcOpenMemHandle_v2(u64 *address, IpcHandle handle, unsigned flags) {
    static const char name[] = "cuIpcOpenMemHandle_v2";
    CHECK_CONTEXT(name);
    Packed packed;
    memcpy(&packed, &handle, sizeof packed);
    if (!address || flags != 1) return misused(name, INVALID_VALUE, 0, 0);
    if (is("FAKE_CUDA_IPC", "refuse-open")) return told(name, MAP_FAILED_, 0, 0);
    if (packed.magic != MAGIC) return misused(name, INVALID_HANDLE, 0, 0);
    if (packed.pid == getpid()) return misused(name, INVALID_CONTEXT, 0, 0);
    char own[16], path[64];
    uuid_of(current()->device, own);
    if (memcmp(own, packed.uuid, 16)) return misused(name, INVALID_CONTEXT, 0, 0);
    snprintf(path, sizeof path, "/proc/%d/fd/%d", packed.pid, packed.fd);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) return told(name, INVALID_HANDLE, 0, packed.size);
    struct stat found;
    CUresult result = fstat(fd, &found) ? INVALID_HANDLE : SUCCESS;
    LOCKED;
    for (int i = 0; i < MOST && !result; i++)
        if (ranges[i].kind == OPENED && ranges[i].file == found.st_ino && ranges[i].file_device == found.st_dev)
            result = ALREADY_MAPPED;
    Range *range = new_range();
    if (!result && (!range || !map_range(range, fd, 0))) result = INVALID_HANDLE;
    if (!result && range->size != packed.size) {
        drop_range(range, 0);
        result = INVALID_HANDLE;
    }
    if (!result) {
        range->kind = OPENED;
        range->device = current()->device;
        range->readable = 1;
        range->buffer = ++last_buffer;
        __atomic_fetch_add(&range->header->open, 1, __ATOMIC_SEQ_CST);
        *address = range->address;
    }
    UNLOCKED;
    close(fd);
    return result == ALREADY_MAPPED ? misused(name, result, 0, packed.size)
                                    : told(name, result, result ? 0 : *address, packed.size);
}

API cuIpcCloseMemHandle(u64 address) {
    CHECK_CONTEXT("cuIpcCloseMemHandle");
    LOCKED;
    Range *range = range_at(address, 0);
    int good = range && range->address == address && range->kind == OPENED && range->device == current()->device;
    if (good) {
        __atomic_fetch_sub(&range->header->open, 1, __ATOMIC_SEQ_CST);
        drop_range(range, 0);
    }
    UNLOCKED;
    return good ? told("cuIpcCloseMemHandle", SUCCESS, address, 0)
                : misused("cuIpcCloseMemHandle", INVALID_VALUE, address, 0);
}

static Part *part_of(u64 handle) {
    return handle >= 1 && handle <= MOST && parts[handle - 1].used ? &parts[handle - 1] : NULL;
}

static u64 new_part(int fd, u64 size) {
    for (int i = 0; i < MOST && fd >= 0; i++)
        if (!parts[i].used && !parts[i].mappings) {
            parts[i] = (Part){.used = 1, .fd = fd, .size = size};
            return i + 1;
        }
    return 0;
}

/* An allocation is gone when nobody has its handle and it is mapped nowhere. */
static void drop_part(Part *part) {
    if (!part->used && !part->mappings) close(part->fd);
}

API cuMemCreate(u64 *handle, size_t size, const void *properties, u64 flags) {
    static const char name[] = "cuMemCreate";
    CHECK_CONTEXT(name);
    if (!handle || !size || size % PAGE || !properties || flags) return misused(name, INVALID_VALUE, 0, size);
    Header made = {.magic = MAGIC, .device = current()->device, .size = size};
    uuid_of(made.device, made.uuid);
    int fd = memfd_create("fake-cuda-part", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, PAGE + size) || pwrite(fd, &made, sizeof made, 0) != sizeof made) return OUT_OF_MEMORY;
    LOCKED;
    *handle = new_part(fd, size);
    UNLOCKED;
    return told(name, *handle ? SUCCESS : OUT_OF_MEMORY, *handle, size);
}

/* Other memory than that which is mapped by parts has none. */
API cuMemRetainAllocationHandle(u64 *handle, void *address) {
    static const char name[] = "cuMemRetainAllocationHandle";
    CHECK_STARTED;
    if (!handle) return misused(name, INVALID_VALUE, 0, 0);
    LOCKED;
    Range *range = range_at((u64)(uintptr_t)address, 0);
    *handle = range && range->kind == MAPPED ? range->part : 0;
    if (*handle) parts[*handle - 1].used++;
    UNLOCKED;
    return told(name, *handle ? SUCCESS : INVALID_VALUE, (u64)(uintptr_t)address, *handle);
}

API cuMemExportToShareableHandle(void *fd, u64 handle, int type, u64 flags) {
    static const char name[] = "cuMemExportToShareableHandle";
    CHECK_STARTED;
    if (is("FAKE_CUDA_IPC", "refuse")) return told(name, INVALID_VALUE, handle, 0);
    LOCKED;
    Part *part = part_of(handle);
    int good = fd && part && type == 1 && !flags;
    if (good) *(int *)fd = fcntl(part->fd, F_DUPFD_CLOEXEC, 0);
    UNLOCKED;
    return good ? told(name, SUCCESS, handle, 0) : misused(name, INVALID_VALUE, handle, 0);
}

API cuMemImportFromShareableHandle(u64 *handle, void *descriptor, int type) {
    static const char name[] = "cuMemImportFromShareableHandle";
    CHECK_STARTED;
    Header header;
    int fd = (int)(uintptr_t)descriptor;
    if (is("FAKE_CUDA_IPC", "refuse-open")) return told(name, NOT_PERMITTED, 0, 0);
    if (!handle || type != 1 || pread(fd, &header, sizeof header, 0) != sizeof header || header.magic != MAGIC)
        return misused(name, INVALID_VALUE, 0, 0);
    LOCKED;
    *handle = new_part(fcntl(fd, F_DUPFD_CLOEXEC, 0), header.size);
    UNLOCKED;
    return told(name, *handle ? SUCCESS : OUT_OF_MEMORY, *handle, header.size);
}

API cuMemRelease(u64 handle) {
    CHECK_STARTED;
    LOCKED;
    Part *part = part_of(handle);
    if (part) {
        part->used--;
        drop_part(part);
    }
    UNLOCKED;
    return part ? told("cuMemRelease", SUCCESS, handle, 0) : misused("cuMemRelease", INVALID_VALUE, handle, 0);
}

/* The public address has no rights; beside it there is one as large for the functions here. */
API cuMemAddressReserve(u64 *address, size_t size, size_t alignment, u64 wanted, u64 flags) {
    static const char name[] = "cuMemAddressReserve";
    CHECK_STARTED;
    if (!address || !size || size % PAGE || alignment || wanted || flags) return misused(name, INVALID_VALUE, 0, size);
    void *at = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    void *view = mmap(NULL, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED || view == MAP_FAILED) return OUT_OF_MEMORY;
    LOCKED;
    Range *range = new_range();
    if (range) {
        range->kind = RESERVED;
        range->address = *address = (u64)(uintptr_t)at;
        range->size = size;
        range->device = -1;
        range->view = view;
    }
    UNLOCKED;
    return told(name, range ? SUCCESS : OUT_OF_MEMORY, *address, size);
}

static int is_mapped(u64 address, u64 size) {
    for (int i = 0; i < MOST; i++)
        if (ranges[i].kind == MAPPED && ranges[i].address < address + size
            && address < ranges[i].address + ranges[i].size)
            return 1;
    return 0;
}

API cuMemAddressFree(u64 address, size_t size) {
    CHECK_STARTED;
    LOCKED;
    Range *range = range_of(address, size, 1);
    int good = range && range->address == address && range->size == size && !is_mapped(address, size);
    if (good) {
        munmap(range->view, size);
        drop_range(range, 0);
    }
    UNLOCKED;
    return (good ? told : misused)("cuMemAddressFree", good ? SUCCESS : INVALID_VALUE, address, size);
}

API cuMemMap(u64 address, size_t size, size_t offset, u64 handle, u64 flags) {
    CHECK_STARTED;
    LOCKED;
    Range *reserved = range_of(address, size, 1), *range = new_range();
    Part *part = part_of(handle);
    int good = reserved && range && part && part->size == size && !(address % PAGE) && !offset && !flags
               && !is_mapped(address, size);
    if (good) {
        char *view = reserved->view + (address - reserved->address);
        void *header = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, part->fd, 0);
        void *at = mmap(view, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, part->fd, PAGE);
        if ((good = header != MAP_FAILED && at != MAP_FAILED)) {
            *range = (Range){.kind = MAPPED, .device = -1, .fd = -1, .address = address, .size = size,
                             .view = view, .part = (int)handle, .header = header};
            part->mappings++;
        }
    }
    UNLOCKED;
    return (good ? told : misused)("cuMemMap", good ? SUCCESS : INVALID_VALUE, address, size);
}

/* For all parts in a range of addresses. */
API cuMemSetAccess(u64 address, size_t size, const Access *access, size_t count) {
    CHECK_STARTED;
    LOCKED;
    int good = count == 1 && access && access->location_type == 1 && access->flags == 3
               && is_device(access->location_id);
    u64 end = address + size;
    for (u64 at = address; good && at < end;) {
        Range *range = range_at(at, 0);
        good = range && range->kind == MAPPED && range->address == at && at + range->size <= end;
        if (good) {
            range->device = access->location_id - DEVICE_HANDLES;
            range->readable = 1;
            at += range->size;
        }
    }
    UNLOCKED;
    return (good ? told : misused)("cuMemSetAccess", good ? SUCCESS : INVALID_VALUE, address, size);
}

API cuMemUnmap(u64 address, size_t size) {
    CHECK_STARTED;
    LOCKED;
    Range *range = range_at(address, size);
    int good = range && range->kind == MAPPED && range->address == address && range->size == size;
    if (good) {
        Part *part = &parts[range->part - 1];
        mmap(range->view, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
        munmap(range->header, PAGE);
        range->kind = FREE;
        part->mappings--;
        drop_part(part);
    }
    UNLOCKED;
    return (good ? told : misused)("cuMemUnmap", good ? SUCCESS : INVALID_VALUE, address, size);
}

/* --- memory of the host --- */

API cuMemHostRegister_v2(void *at, size_t size, unsigned flags) {
    static const char name[] = "cuMemHostRegister_v2";
    CHECK_CONTEXT(name);
    u64 address = (u64)(uintptr_t)at;
    if (is("FAKE_CUDA_REGISTER", "refuse")) return told(name, NOT_PERMITTED, address, size);
    if (!size || flags != 1 || !is_host(at, size)) return misused(name, INVALID_VALUE, address, size);
    CUresult result = OUT_OF_MEMORY;
    LOCKED;
    for (int i = 0; i < MOST; i++)
        if (pinned[i].size && address < pinned[i].address + pinned[i].size && pinned[i].address < address + size)
            result = ALREADY_REGISTERED;
    for (int i = 0; i < MOST && result == OUT_OF_MEMORY; i++)
        if (!pinned[i].size) {
            pinned[i] = (Pinned){address, size};
            if (i >= most_pinned) most_pinned = i + 1;
            result = SUCCESS;
        }
    UNLOCKED;
    return (result ? misused : told)(name, result, address, size);
}

API cuMemHostUnregister(void *at) {
    static const char name[] = "cuMemHostUnregister";
    CHECK_CONTEXT(name);
    u64 address = (u64)(uintptr_t)at, size = 0;
    LOCKED;
    for (int i = 0; i < MOST; i++)
        if (pinned[i].size && pinned[i].address == address) {
            size = pinned[i].size;
            pinned[i].size = 0;
        }
    UNLOCKED;
    if (!size) return misused(name, NOT_REGISTERED, address, 0);
    if (!is_host(at, size)) return misused("unregistered-after-unmap", SUCCESS, address, size);
    return told(name, SUCCESS, address, size);
}

/* --- for tests: what this process has --- */

#define COUNT(name, array, condition)                                            \
    API name(void) {                                                             \
        int count = 0;                                                           \
        LOCKED;                                                                  \
        for (int i = 0; i < MOST; i++) count += (condition) ? 1 : 0;             \
        UNLOCKED;                                                                \
        return count;                                                            \
    }

COUNT(fake_allocations, ranges, ranges[i].kind == ALLOCATED || ranges[i].kind == MANAGED)
COUNT(fake_open_handles, ranges, ranges[i].kind == OPENED || ranges[i].kind == MAPPED || ranges[i].kind == RESERVED)
COUNT(fake_registered, pinned, pinned[i].size)
COUNT(fake_parts, parts, parts[i].used || parts[i].mappings)
API fake_misuses(void) { return misuses; }
API fake_depth(void) { return depth; }
API fake_retained(int ordinal) { return ordinal >= 0 && ordinal < MOST_DEVICES ? contexts[ordinal].retained : -1; }

/* An address at which the host may read and write what a device has at its own; 0: that is no device's. */
__attribute__((visibility("default"))) u64 fake_view(u64 address, u64 size) {
    LOCKED;
    Range *range = ranges_at(address, size);
    u64 found = range && range->readable ? (u64)(uintptr_t)view_of(range, address) : 0;
    UNLOCKED;
    return found;
}
