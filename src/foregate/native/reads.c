/* Reads of whole experts by a pool of threads: split into chunks, demand before speculation, verified as they arrive.
   One request per slot of the expert pool; its `status` is shared with Python, everything else lies behind one lock.
   Plain pread: io_uring measured the same bandwidth here and saves 8 ms of CPU per GB, see dev/LOG.md. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "xxh3.h"

#define BLOCK 4096 /* a direct read can only be continued from a multiple of this */
#define BACKOFF_S 0.001
#define MERGED 16             /* experts that one read may bring */
#define MERGED_BYTES (1 << 20) /* more gains nothing: see dev/LOG.md */
#define SEARCHED 64           /* places of a queue that are searched for a neighbour */

/* From DONE on nothing writes to the slot any more. STALLED: timed out, but a chunk may still be being read. */
enum status { RUNNING, STALLED, DONE, COMPLETE = DONE, FAILED, CANCELLED };
enum failure { NONE, SYSTEM, TRUNCATED, CHECKSUM, TIMEOUT };

/* Bytes read, or a negated errno. Replaces pread in tests. */
typedef int64_t (*source_fn)(int64_t offset, uint8_t *into, int64_t nbytes);

typedef struct {
    int32_t failure, number; /* number: errno */
    int64_t offset, size;    /* of the chunk in the file; size of the file when it was too short */
} error_t_;

typedef struct {
    double began, ended;
    int64_t nbytes; /* 0: failed */
    int64_t reader;
} span;

typedef struct request {
    struct request *before, *after; /* in its queue */
    uint8_t *memory, *have;         /* have[i]: chunk i has arrived */
    int64_t offset, nbytes, chunk_bytes;
    int32_t chunks, next, running, finished, rereads, hashed, room;
    int speculative, urgent, queued, cancelled, restart, complete, verify, hashing;
    double progress_at;
    error_t_ error;
    xxh3_digest wanted;
    uint64_t acc[8];
    span *spans; /* of what was read since the submission */
    int32_t span_count, span_room;
} request;

typedef struct {
    int64_t demand_bytes, prefetch_bytes, chunks, retries, rereads, failed, failed_prefetch, cancelled;
    double busy_s, active_s;
} counters;

typedef struct {
    pthread_mutex_t lock;
    pthread_cond_t work, ended;
    request *requests, *first[2], *last[2]; /* queues: 0 speculation, 1 demand */
    int32_t *status;
    int32_t slots, retries, readers, live, idle, reading, closed;
    int direct_fd, plain_fd, refused; /* refused: the file system does not do direct reads after all */
    source_fn source;
    xxh3_blocks hash;
    double progress_at, since;
    counters stats;
} pool;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static struct timespec deadline(double at) {
    struct timespec t = {(time_t)at, 0};
    t.tv_nsec = (long)((at - (double)t.tv_sec) * 1e9);
    return t;
}

static void publish(pool *p, request *r, int status) {
    __atomic_store_n(&p->status[r - p->requests], status, __ATOMIC_RELEASE);
}

/* Queues */

static void unlink_request(pool *p, request *r) {
    if (!r->queued) return;
    if (r->before) r->before->after = r->after;
    else p->first[r->urgent] = r->after;
    if (r->after) r->after->before = r->before;
    else p->last[r->urgent] = r->before;
    r->queued = 0;
}

/* One reader, who wakes the next when it has taken a chunk and there is another: to wake takes microseconds, which are
 * not to be spent by whoever submits. */
static void wake(pool *p) {
    if (p->idle && (p->first[0] || p->first[1])) pthread_cond_signal(&p->work);
}

/* At the end of the queue of its class, if there is a chunk left to take. */
static void enqueue(pool *p, request *r) {
    if (r->queued || r->next == r->chunks) return;
    r->after = NULL;
    r->before = p->last[r->urgent];
    if (r->before) r->before->after = r;
    else p->first[r->urgent] = r;
    p->last[r->urgent] = r;
    r->queued = 1;
    wake(p);
}

/* State changes; the lock is held */

static void rewind_request(request *r) {
    r->next = r->finished = r->hashed = 0;
    r->restart = r->complete = 0;
    r->error.failure = NONE;
    memset(r->have, 0, (size_t)r->chunks);
    xxh3_start(r->acc);
}

/* The first error is kept, a cancelled request's too: it may be revived. */
static void fail(pool *p, request *r, error_t_ error) {
    if (r->error.failure) return;
    r->error = error;
    p->stats.failed++;
    p->stats.failed_prefetch += !r->urgent;
    unlink_request(p, r);
}

/* Something ended: begin again, or say that the request is done, unless a chunk of it is still being read. */
static void settle(pool *p, request *r) {
    if (r->running) return;
    if (r->restart && !r->cancelled) {
        rewind_request(r);
        publish(p, r, RUNNING);
        enqueue(p, r);
    } else if (r->error.failure || r->cancelled || r->complete) {
        publish(p, r, r->error.failure ? FAILED : r->cancelled ? CANCELLED : COMPLETE);
        pthread_cond_broadcast(&p->ended);
    }
}

static error_t_ error_at(const request *r, int32_t chunk, enum failure failure) {
    return (error_t_){(int32_t)failure, 0, r->offset + chunk * r->chunk_bytes, 0};
}

/* Reading; no lock held */

static int64_t read_once(pool *p, int64_t offset, uint8_t *into, int64_t nbytes, int *direct) {
    *direct = 0;
    if (p->source) return p->source(offset, into, nbytes);
    if (p->direct_fd >= 0 && !__atomic_load_n(&p->refused, __ATOMIC_RELAXED)) {
        *direct = 1;
        ssize_t count = pread(p->direct_fd, into, (size_t)nbytes, offset);
        if (count >= 0) return count;
        if (errno != EINVAL && errno != EOPNOTSUPP) return -errno;
        __atomic_store_n(&p->refused, 1, __ATOMIC_RELAXED);
        *direct = 0;
    }
    ssize_t count = pread(p->plain_fd, into, (size_t)nbytes, offset);
    if (count < 0) return -errno;
    /* the budget must not be exceeded in the page cache */
    posix_fadvise(p->plain_fd, offset, count, POSIX_FADV_DONTNEED);
    return count;
}

static int64_t file_size(pool *p) {
    struct stat found;
    return p->source || fstat(p->plain_fd, &found) ? 0 : (int64_t)found.st_size;
}

/* Bytes read, fewer than asked only where the file ends; or a negated errno. */
static int64_t read_range(pool *p, int64_t offset, uint8_t *into, int64_t nbytes) {
    int64_t done = 0;
    while (done < nbytes) {
        int direct;
        int64_t count = read_once(p, offset + done, into + done, nbytes - done, &direct);
        if (count == -EINTR) continue;
        if (count < 0) return count;
        if (count == 0) break;
        int64_t reached = done + count;
        if (direct && reached % BLOCK && reached < nbytes) {
            if (offset + reached >= file_size(p)) return reached;
            reached -= reached % BLOCK;
            if (reached == done) return -EIO;
        }
        done = reached;
    }
    return done;
}

static int64_t chunk_bytes(const request *r, int32_t chunk) {
    int64_t left = r->nbytes - chunk * r->chunk_bytes;
    return left < r->chunk_bytes ? left : r->chunk_bytes;
}

static error_t_ read_chunk(pool *p, const request *r, int32_t chunk, int *tries) {
    error_t_ error = error_at(r, chunk, NONE);
    int64_t nbytes = chunk_bytes(r, chunk);
    for (*tries = 0;; ++*tries) {
        int64_t count = read_range(p, error.offset, r->memory + chunk * r->chunk_bytes, nbytes);
        if (count == nbytes) return error;
        if (count >= 0) {
            error.failure = TRUNCATED;
            error.size = file_size(p);
            return error;
        }
        if (*tries == p->retries) {
            error.failure = SYSTEM;
            error.number = (int32_t)-count;
            return error;
        }
        double wait = BACKOFF_S * (double)(1 << *tries);
        struct timespec pause = deadline(wait);
        nanosleep(&pause, NULL);
    }
}

/* Neighbours in the file, in one read; false if it did not bring them all: then each is read alone. */
static int read_merged(pool *p, request **group, int count) {
    struct iovec parts[MERGED];
    ssize_t wanted = 0;
    for (int i = 0; i < count; i++) {
        parts[i] = (struct iovec){group[i]->memory, (size_t)group[i]->nbytes};
        wanted += group[i]->nbytes;
    }
    int direct = p->direct_fd >= 0 && !__atomic_load_n(&p->refused, __ATOMIC_RELAXED);
    ssize_t found = preadv(direct ? p->direct_fd : p->plain_fd, parts, count, group[0]->offset);
    if (!direct) posix_fadvise(p->plain_fd, group[0]->offset, wanted, POSIX_FADV_DONTNEED);
    return found == wanted;
}

/* Feed the chunks from..to to the digest; true when that was the end and the digest is not the wanted one. */
static int hash_chunks(const pool *p, request *r, int32_t from, int32_t to) {
    const uint8_t *begin = r->memory + from * r->chunk_bytes;
    int64_t nbytes = (to == r->chunks ? r->nbytes : to * r->chunk_bytes) - from * r->chunk_bytes;
    uint64_t blocks = (uint64_t)nbytes / XXH3_BLOCK - (to == r->chunks);
    p->hash(r->acc, begin, blocks);
    if (to < r->chunks) return 0;
    xxh3_digest found = xxh3_finish(r->acc, begin + blocks * XXH3_BLOCK, (uint64_t)r->nbytes);
    return found.low != r->wanted.low || found.high != r->wanted.high;
}

/* Verify what has arrived in order, while it is in the processor's cache. The lock is held, but not while hashing;
   chunks that arrive meanwhile on other threads are left to this one. */
static void absorb(pool *p, request *r) {
    if (!r->verify) {
        r->complete = r->finished == r->chunks;
        return;
    }
    while (!r->hashing && !r->error.failure && r->hashed < r->chunks && r->have[r->hashed]) {
        int32_t from = r->hashed, to = from;
        while (to < r->chunks && r->have[to]) to++;
        r->hashing = 1;
        pthread_mutex_unlock(&p->lock);
        int bad = hash_chunks(p, r, from, to);
        pthread_mutex_lock(&p->lock);
        r->hashing = 0;
        r->hashed = to;
        if (to < r->chunks || r->error.failure) continue;
        if (!bad) {
            r->complete = 1;
        } else if (r->rereads < p->retries) {
            r->rereads++;
            p->stats.rereads++;
            r->restart = 1;
        } else {
            fail(p, r, error_at(r, 0, CHECKSUM));
        }
    }
}

/* Workers */

static void note(request *r, span read) {
    if (r->span_count == r->span_room) {
        int32_t room = r->span_room ? 2 * r->span_room : 16;
        span *spans = realloc(r->spans, (size_t)room * sizeof *spans);
        if (!spans) return; /* only a listener misses it */
        r->spans = spans;
        r->span_room = room;
    }
    r->spans[r->span_count++] = read;
}

/* `first` and small experts of its queue that lie beside it in the file, in file order: how many. */
static int gather(const pool *p, request *first, request **group) {
    int count = 1;
    group[0] = first;
    if (first->chunks > 1 || p->source) return count;
    int64_t begin = first->offset, end = begin + first->nbytes;
    request *r = p->first[first->urgent];
    for (int seen = 0; r && seen < SEARCHED && count < MERGED; seen++) {
        int fits = r != first && r->chunks == 1 && end - begin + r->nbytes <= MERGED_BYTES;
        if (fits && r->offset == end) {
            group[count++] = r;
            end += r->nbytes;
        } else if (fits && r->offset + r->nbytes == begin) {
            memmove(group + 1, group, (size_t)count++ * sizeof *group);
            group[0] = r;
            begin = r->offset;
        } else {
            r = r->after;
            continue;
        }
        r = p->first[first->urgent]; /* its own neighbour may stand before it */
    }
    return count;
}

/* One chunk of `r` has been read, or not: account for it. The lock is held. */
static void arrived(pool *p, request *r, int32_t chunk, error_t_ error, span read) {
    r->progress_at = read.ended;
    read.nbytes = error.failure ? 0 : chunk_bytes(r, chunk);
    note(r, read);
    if (error.failure) {
        fail(p, r, error);
    } else {
        p->stats.chunks++;
        *(r->speculative ? &p->stats.prefetch_bytes : &p->stats.demand_bytes) += read.nbytes;
        r->finished++;
        r->have[chunk] = 1;
        absorb(p, r);
    }
    r->running--;
    settle(p, r);
}

static void serve(pool *p, request *first, int32_t reader) {
    request *group[MERGED];
    int count = gather(p, first, group), merged = count > 1, tries = 0;
    int32_t chunk = first->next;
    double began = now();
    for (int i = 0; i < count; i++) {
        if (++group[i]->next == group[i]->chunks) unlink_request(p, group[i]);
        group[i]->running++;
        group[i]->progress_at = began;
    }
    if (p->reading++ == 0) p->since = began;
    wake(p);
    pthread_mutex_unlock(&p->lock);

    if (merged) merged = read_merged(p, group, count);
    error_t_ errors[MERGED];
    for (int i = 0; i < count; i++) {
        int more = 0;
        errors[i] = merged ? error_at(group[i], 0, NONE) : read_chunk(p, group[i], chunk, &more);
        tries += more;
    }

    pthread_mutex_lock(&p->lock);
    double end = p->progress_at = now();
    p->stats.busy_s += end - began;
    if (--p->reading == 0) p->stats.active_s += end - p->since;
    p->stats.retries += tries;
    for (int i = 0; i < count; i++) arrived(p, group[i], chunk, errors[i], (span){began, end, 0, reader});
}

static void *work(void *argument) {
    pool *p = argument;
    pthread_mutex_lock(&p->lock);
    int32_t reader = p->readers++;
    while (!p->closed) {
        request *r = p->first[1] ? p->first[1] : p->first[0];
        if (r) {
            serve(p, r, reader);
        } else {
            p->idle++;
            pthread_cond_wait(&p->work, &p->lock);
            p->idle--;
        }
    }
    p->live--;
    pthread_cond_broadcast(&p->ended);
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

/* What Python calls */

void reads_free(pool *p) {
    for (int32_t i = 0; i < p->slots; i++) {
        free(p->requests[i].have);
        free(p->requests[i].spans);
    }
    free(p->requests);
    pthread_cond_destroy(&p->work);
    pthread_cond_destroy(&p->ended);
    pthread_mutex_destroy(&p->lock);
    free(p);
}

/* Drop what is queued. Threads still alive after `patience` seconds, each in a read that hangs, are left alone. */
int32_t reads_close(pool *p, double patience) {
    struct timespec until = deadline(now() + patience);
    pthread_mutex_lock(&p->lock);
    p->closed = 1;
    pthread_cond_broadcast(&p->work);
    pthread_cond_broadcast(&p->ended);
    while (p->live && pthread_cond_timedwait(&p->ended, &p->lock, &until) != ETIMEDOUT) {}
    int32_t live = p->live;
    pthread_mutex_unlock(&p->lock);
    return live;
}

/* A pool of `threads` for `slots` requests, whose `status` Python keeps; NULL when there is no room for it. */
pool *reads_open(int32_t threads, int32_t slots, int32_t *status, int32_t retries, int direct_fd, int plain_fd,
                 source_fn source) {
    pool *p = calloc(1, sizeof *p);
    request *requests = calloc((size_t)slots, sizeof *requests);
    if (!p || !requests) {
        free(p);
        free(requests);
        return NULL;
    }
    p->requests = requests;
    p->status = status;
    p->slots = slots;
    p->retries = retries;
    p->direct_fd = direct_fd;
    p->plain_fd = plain_fd;
    p->source = source;
    for (int kind = 2; !p->hash; kind--) p->hash = xxh3_way(kind);
    pthread_condattr_t clock;
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->work, &clock);
    pthread_cond_init(&p->ended, &clock);
    pthread_condattr_destroy(&clock);

    /* signals are Python's business, on Python's threads */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (int32_t i = 0; i < threads; i++) {
        pthread_t thread;
        pthread_mutex_lock(&p->lock);
        int failed = pthread_create(&thread, NULL, work, p);
        p->live += !failed;
        pthread_mutex_unlock(&p->lock);
        if (failed) break;
        pthread_setname_np(thread, "foregate-read");
        pthread_detach(thread);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return p;
}

int32_t reads_threads(pool *p) {
    pthread_mutex_lock(&p->lock);
    int32_t live = p->live;
    pthread_mutex_unlock(&p->lock);
    return live;
}

/* Read `nbytes` from `offset` into `memory`. `digest` (low, high) may be NULL: then nothing is verified.
   False when there is no memory for it. The slot's last request must be done. */
int reads_submit(pool *p, int64_t slot, int64_t offset, int64_t nbytes, int64_t chunk_bytes, uint8_t *memory,
                 int64_t speculative, const uint64_t *digest) {
    request *r = &p->requests[slot];
    pthread_mutex_lock(&p->lock);
    int32_t chunks = (int32_t)((nbytes + chunk_bytes - 1) / chunk_bytes);
    if (chunks > r->room) {
        uint8_t *have = realloc(r->have, (size_t)chunks);
        if (!have) {
            pthread_mutex_unlock(&p->lock);
            return 0;
        }
        r->have = have;
        r->room = chunks;
    }
    r->memory = memory;
    r->offset = offset;
    r->nbytes = nbytes;
    r->chunk_bytes = chunk_bytes;
    r->chunks = chunks;
    r->speculative = (int)speculative;
    r->urgent = !speculative;
    r->cancelled = 0;
    r->rereads = r->span_count = 0;
    r->verify = digest != NULL;
    if (digest) r->wanted = (xxh3_digest){digest[0], digest[1]};
    rewind_request(r);
    publish(p, r, RUNNING);
    enqueue(p, r);
    pthread_mutex_unlock(&p->lock);
    return 1;
}

/* Continue at demand priority; revive what was cancelled, begin again what failed before it was needed. */
int32_t reads_promote(pool *p, int64_t slot) {
    request *r = &p->requests[slot];
    pthread_mutex_lock(&p->lock);
    if (!r->urgent) {
        unlink_request(p, r);
        r->urgent = 1;
        p->stats.cancelled -= r->cancelled;
        r->cancelled = 0;
        if (r->error.failure) {
            r->error.failure = NONE;
            r->rereads = 0;
            r->restart = 1;
            publish(p, r, RUNNING);
        } else if (!r->complete && !r->restart) {
            publish(p, r, RUNNING);
            enqueue(p, r);
        }
        settle(p, r);
    }
    int32_t status = p->status[slot];
    pthread_mutex_unlock(&p->lock);
    return status;
}

int32_t reads_cancel(pool *p, int64_t slot) {
    request *r = &p->requests[slot];
    pthread_mutex_lock(&p->lock);
    if (p->status[slot] < DONE && !r->cancelled && !r->error.failure) {
        unlink_request(p, r);
        r->cancelled = 1;
        r->urgent = 0;
        p->stats.cancelled++;
        settle(p, r);
    }
    int32_t status = p->status[slot];
    pthread_mutex_unlock(&p->lock);
    return status;
}

/* The status, and with it everything that was written to the slot before. */
int32_t reads_status(pool *p, int64_t slot) { return __atomic_load_n(&p->status[slot], __ATOMIC_ACQUIRE); }

/* Of the last sign of life: its own while a chunk is being read, any while it queues behind others. */
static double alive_at(const pool *p, const request *r, double began) {
    double at = r->running ? r->progress_at : p->progress_at;
    return at > began ? at : began;
}

/* Wait for one of `slots` to end: its place in the list; -1 after `slice` seconds, -2 when the pool is closed.
   A request without a sign of life for `timeout` seconds (counted from `began` at the earliest) fails. */
int32_t reads_wait(pool *p, const int32_t *slots, int32_t count, double began, double timeout, double slice) {
    double until = now() + slice;
    int32_t answer = -1;
    pthread_mutex_lock(&p->lock);
    for (;;) {
        int32_t oldest = 0;
        for (int32_t i = 0; i < count && answer < 0; i++) {
            if (p->status[slots[i]] != RUNNING) answer = i;
            const request *r = &p->requests[slots[i]], *least = &p->requests[slots[oldest]];
            if (alive_at(p, r, began) < alive_at(p, least, began)) oldest = i;
        }
        if (answer >= 0) break;
        if (p->closed) {
            answer = -2;
            break;
        }
        request *r = &p->requests[slots[oldest]];
        double end = alive_at(p, r, began) + timeout, at = now();
        if (end <= at) {
            int32_t place = r->finished < r->chunks ? r->finished : r->chunks - 1;
            fail(p, r, error_at(r, place, TIMEOUT));
            publish(p, r, STALLED);
            settle(p, r);
        } else if (at >= until) {
            break;
        } else {
            struct timespec next = deadline(end < until ? end : until);
            pthread_cond_timedwait(&p->ended, &p->lock, &next);
        }
    }
    pthread_mutex_unlock(&p->lock);
    return answer;
}

/* What has been read for the request, at most `room` reads of it: how many. */
int32_t reads_spans(pool *p, int32_t slot, span *into, int32_t room) {
    const request *r = &p->requests[slot];
    pthread_mutex_lock(&p->lock);
    int32_t count = r->span_count;
    if (count && room) memcpy(into, r->spans, (size_t)(count < room ? count : room) * sizeof *into);
    pthread_mutex_unlock(&p->lock);
    return count;
}

/* The digest (low, high) of `nbytes` bytes, computed as `kind` says; false where this processor cannot. */
int reads_digest(const uint8_t *data, uint64_t nbytes, int kind, uint64_t *into) {
    xxh3_blocks hash = xxh3_way(kind);
    uint64_t acc[8], before = nbytes / XXH3_BLOCK - 1;
    if (!hash) return 0;
    xxh3_start(acc);
    hash(acc, data, before);
    xxh3_digest found = xxh3_finish(acc, data + before * XXH3_BLOCK, nbytes);
    into[0] = found.low;
    into[1] = found.high;
    return 1;
}

void reads_error(pool *p, int32_t slot, error_t_ *into) {
    pthread_mutex_lock(&p->lock);
    *into = p->requests[slot].error;
    pthread_mutex_unlock(&p->lock);
}

/* True once the file system has refused direct reads. */
int reads_stats(pool *p, counters *into) {
    pthread_mutex_lock(&p->lock);
    *into = p->stats;
    if (p->reading) into->active_s += now() - p->since;
    int refused = __atomic_load_n(&p->refused, __ATOMIC_RELAXED);
    pthread_mutex_unlock(&p->lock);
    return refused;
}
