/* test_engine_nvme.c - how requests become NVMe commands: their lengths, and what is in them. */
#include "../../csrc/engine_nvme.c"

#include "check.h"

#ifdef DUALBLADE_NO_URING

int main(void)
{
    return 0;
}

#else

enum { ROUNDS = 20000, SLOT = 3, MEMORY_BYTES = 8 << 20 };

static uint64_t seed;

static uint32_t power_of_two(uint32_t from_shift, uint32_t to_shift)
{
    return 1u << (from_shift + check_random_below(&seed, to_shift - from_shift + 1));
}

/* A drive and a request of it, each with limits of its own. */
static void choose(struct db_engine *engine, struct db_request *request)
{
    struct db_nvme_namespace *space = &engine->spaces[0];
    uint32_t shift = check_random_below(&seed, 2) ? 12 : 9;
    *space = (struct db_nvme_namespace){
        .nsid = 7,
        .lba_shift = shift,
        .lba_bytes = 1u << shift,
        .transfer_bytes = power_of_two(12, 18),
        .has_placement = check_random_below(&seed, 2),
        .run_handle = 5,
        .tail_handle = 0x8001,
    };
    if (check_random_below(&seed, 2)) /* of any length in whole blocks of ours */
        space->boundary_bytes = (1 + (uint32_t)check_random_below(&seed, 64)) * DB_BLOCK_BYTES;
    engine->lengths[0].most_bytes = power_of_two(12, 22);
    engine->lengths[1 + SLOT].most_bytes = power_of_two(12, 22);
    *request = (struct db_request){
        .direction = check_random_below(&seed, 2) ? DB_WRITE : DB_READ,
        .buffer = (void *)(uintptr_t)(0x10000000 + check_random_below(&seed, 2) * 512),
        .offset = check_random_below(&seed, 1ull << 40) * space->lba_bytes,
        .length = (1 + (uint32_t)check_random_below(&seed, MEMORY_BYTES >> shift)) << shift,
        .slot = check_random_below(&seed, 2) ? SLOT : DB_REGION_NONE,
        .is_tail = check_random_below(&seed, 2),
    };
}

static void check_length(struct db_engine *engine, const struct db_request *request,
                         const struct command *command)
{
    const struct db_nvme_namespace *space = &engine->spaces[0];
    uint64_t start = request->offset + command->at;
    uint32_t most = engine->lengths[request->slot == SLOT ? 1 + SLOT : 0].most_bytes;
    bool is_aligned = ((uintptr_t)request->buffer + command->at) % 4096 == 0;
    CHECK(command->length > 0 && command->length % space->lba_bytes == 0);
    CHECK(command->length <= most);
    CHECK(is_aligned || command->length <= space->transfer_bytes);
    if (space->boundary_bytes > 0)
        CHECK_EQUAL(start / space->boundary_bytes,
                    (start + command->length - 1) / space->boundary_bytes);
}

/* By the words of the NVM command set: blocks are counted from zero in the lower half of double
 * word 12, the directive is in its bits 20 to 23, what it names in the upper half of word 13. */
static void check_command(const struct db_engine *engine, const struct db_request *request,
                          const struct command *command)
{
    const struct db_nvme_namespace *space = &engine->spaces[0];
    struct io_uring_sqe sqe[2];
    memset(sqe, 0, sizeof(sqe));
    prepare_passthrough((struct db_engine *)engine, command, sqe);
    const struct nvme_uring_cmd *nvme = (const struct nvme_uring_cmd *)sqe[0].cmd;
    CHECK_EQUAL(nvme->opcode, request->direction == DB_WRITE ? 1 : 2);
    CHECK_EQUAL(nvme->nsid, 7);
    CHECK_EQUAL(nvme->data_len, command->length);
    CHECK_EQUAL((nvme->cdw12 & 0xffff) + 1, command->length / space->lba_bytes);
    CHECK_EQUAL(nvme->cdw10 | (uint64_t)nvme->cdw11 << 32,
                (request->offset + command->at) / space->lba_bytes);
    bool is_placed = request->direction == DB_WRITE && space->has_placement;
    CHECK_EQUAL(nvme->cdw12 >> 16, is_placed ? 2 << 4 : 0);
    CHECK_EQUAL(nvme->cdw13 >> 16, is_placed ? (request->is_tail ? 0x8001 : 5) : 0);
    CHECK_EQUAL(nvme->cdw13 & 0xffff, 0);
    CHECK_EQUAL(sqe[0].uring_cmd_flags, request->slot == SLOT ? IORING_URING_CMD_FIXED : 0);
}

static struct db_request *refuse(struct db_engine *engine, struct command *command, int error)
{
    command->request->left_bytes = command->request->length = command->length;
    command->request->result = 0;
    return finish_command(engine, command, error);
}

/* Refused for its length: halved until the kernel takes it, with its own memory alone. What it has
 * taken before is not refused for that: it goes by the block device. */
static void check_refusals(struct db_engine *engine)
{
    struct db_request request = {.slot = SLOT};
    struct command command = {.request = &request};
    struct lengths *plain = &engine->lengths[0], *registered = &engine->lengths[1 + SLOT];
    engine->spaces[0] = (struct db_nvme_namespace){.lba_bytes = 512, .lba_shift = 9};
    *plain = (struct lengths){.most_bytes = 64 << 10};
    *registered = (struct lengths){.most_bytes = 1 << 20};
    for (command.length = 1 << 20; command.length > 32 << 10; command.length /= 2) {
        CHECK(refuse(engine, &command, -EINVAL) == &request);
        CHECK_EQUAL(request.result, -EAGAIN);
        CHECK_EQUAL(registered->most_bytes, command.length / 2);
        CHECK_EQUAL(plain->most_bytes, 64 << 10);
    }
    CHECK(!request.by_block_device);
    refuse(engine, &command, 0);
    CHECK_EQUAL(request.result, 32 << 10);
    refuse(engine, &command, -EINVAL);
    CHECK_EQUAL(request.result, -EAGAIN);
    CHECK_EQUAL(registered->most_bytes, 32 << 10);
    CHECK(request.by_block_device);

    request = (struct db_request){.slot = DB_REGION_NONE};
    command.length = 40 << 10; /* of the end of a request */
    refuse(engine, &command, -ENOMEM);
    CHECK(!request.by_block_device);
    CHECK_EQUAL(plain->most_bytes, 16 << 10);
    command.length = 512;
    refuse(engine, &command, -EINVAL);
    CHECK(request.by_block_device);
    CHECK_EQUAL(plain->most_bytes, 16 << 10);
}

int main(void)
{
    static struct db_engine engine;
    struct db_request request;
    seed = check_seed("test_engine_nvme");
    for (int round = 0; round < ROUNDS; round++) {
        choose(&engine, &request);
        for (request.sent_bytes = 0; request.sent_bytes < request.length;) {
            struct command command = {.request = &request,
                                      .at = request.sent_bytes,
                                      .length = next_length(&engine, &request)};
            check_length(&engine, &request, &command);
            check_command(&engine, &request, &command);
            request.sent_bytes += command.length;
        }
        CHECK_EQUAL(request.sent_bytes, request.length);
    }
    check_refusals(&engine);
    return check_report("test_engine_nvme");
}

#endif
