// The products that threads have given and not waited for, and how a warp makes one: `warpgroups.hpp`.

#include <map>
#include <utility>
#include <vector>

#include "machine.hpp"

extern "C" {
struct Index { twin::u32 x; };
extern Index threadIdx;
extern char* shared;
}

namespace twin {

namespace {

struct Product {
    float* sum;
    const u32* a;
    u32 b;
};

struct Products {
    std::vector<std::vector<Product>> groups;
    std::vector<Product> open;
};

// A multiprocessor has one block at a time, and so one thread of each number.
Products& mine() {
    static std::map<std::pair<const char*, u32>, Products> all;
    return all[{shared, threadIdx.x}];
}

void multiply(const Product& product) {
    u32 a[32][4];
    exchange(product.a, a, sizeof(a[0]));
    const u32 lane = threadIdx.x % 32;
    for (u32 i = 0; i < 16; ++i) {
        const u32 column = i / 2 * 8 + lane % 4 * 2 + i % 2;
        u32 b[8];
        for (u32 half = 0; half < 2; ++half) {
            const u32 place = product.b + column * 128 + half * 16;
            load(b + half * 4, shared + (place ^ place / 128 % 8 * 16), 16);
        }
        for (u32 eight = 0; eight < 2; ++eight) {
            float& sum = product.sum[i / 2 * 4 + eight * 2 + i % 2];
            for (u32 pair = 0; pair < 8; ++pair) {
                const u32 w = a[lane / 4 * 4 + pair % 4][pair / 4 * 2 + eight];
                sum += from_bfloat16(w) * from_bfloat16(b[pair]);
                sum += from_bfloat16(w >> 16) * from_bfloat16(b[pair] >> 16);
            }
        }
    }
}

}  // namespace

void product_given(float* sum, const u32* a, u32 b) { mine().open.push_back({sum, a, b}); }

void products_end() {
    Products& own = mine();
    own.groups.push_back(std::move(own.open));
    own.open.clear();
}

void products_wait(u32 groups) {
    Products& own = mine();
    while (own.groups.size() > groups) {
        const std::vector<Product> first = std::move(own.groups.front());
        own.groups.erase(own.groups.begin());
        for (const Product& product : first) multiply(product);
    }
}

}  // namespace twin
