/* stripes.h - where a byte of a device lies: on which of its members, and where on that one.
 *
 * Stripe unit s of the device is unit s / n of member s % n, of n members. */
#ifndef DUALBLADE_STRIPES_H
#define DUALBLADE_STRIPES_H

#include <stdint.h>

struct db_stripes {
    uint32_t member_count;
    uint64_t unit_bytes; /* a power of two; one member needs none */
};

struct db_place {
    uint32_t member;
    uint64_t offset; /* on the member */
    uint64_t left;   /* bytes from here on that lie side by side on the member */
};

static inline struct db_place db_stripes_find(const struct db_stripes *stripes, uint64_t offset)
{
    if (stripes->member_count == 1)
        return (struct db_place){.member = 0, .offset = offset, .left = UINT64_MAX - offset};
    uint64_t inside = offset & (stripes->unit_bytes - 1);
    uint64_t unit = offset / stripes->unit_bytes;
    return (struct db_place){
        .member = (uint32_t)(unit % stripes->member_count),
        .offset = unit / stripes->member_count * stripes->unit_bytes + inside,
        .left = stripes->unit_bytes - inside,
    };
}

/* The part of [0, offset) that is on this member: bytes at its start. */
static inline uint64_t db_stripes_before(const struct db_stripes *stripes, uint32_t member,
                                         uint64_t offset)
{
    struct db_place place = db_stripes_find(stripes, offset);
    if (member == place.member)
        return place.offset;
    uint64_t row = place.offset & ~(stripes->unit_bytes - 1);
    return member < place.member ? row + stripes->unit_bytes : row;
}

#endif
