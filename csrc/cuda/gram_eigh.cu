// Eigenvalues and eigenvectors of many small positive semidefinite matrices, one block for each.
//
// One-sided Jacobi (Hestenes 1958) of W = G + s I: rotations from the right make the columns of W orthogonal, W V = Q
// L. W is positive definite, hence its own polar factor, and Q = V: the directions of the columns are the eigenvectors.
// The shift s, a share of the norm, keeps columns of a null space from being rounding alone; a larger one would add the
// rounding of its own size in every rotation. Eigenvalues are quotients v' G v, which err by the square of v's error.
// One n x n array in shared memory is all there is.
//
// The n / 2 pairs of a step are disjoint (round-robin tournament: column 0 stays, the others move round) and each is
// the work of a team of 16 threads that hold it in registers; n - 1 steps make a sweep, and sweeps end when one has
// rotated nothing.
//
// Letters: n order of a matrix; p, q columns of a pair; a, b their squared lengths and c their product. Device code
// only: compiles under NVRTC and as host C++.

namespace balanced_rep {

using int64 = long long;

constexpr int kMaxThreads = 512;  // a block of them, or as many as n / 2 teams are
constexpr int kTeam = 16;
constexpr int kLargest = 128;                              // order
constexpr int kHeld = kLargest / kTeam;                    // numbers of a column in a thread
constexpr int kSweeps = 60;                                // about 10 are taken, 25 where eigenvalues fall by 14 digits
constexpr double kOrthogonal = 4 * 2.220446049250313e-16;  // share of |p| |q| that rounding leaves of a product
constexpr double kShift = 1. / 64;                         // of the norm
constexpr double kIndefinite = 1e-8;                       // of the norm: an eigenvalue this far below zero is none
constexpr unsigned kAll = 0xffffffffu;

// Sum over the threads of a team; all threads of the warp must come here.
__device__ __forceinline__ double team_sum(double x) {
#pragma unroll
  for (int step = kTeam / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAll, x, step);
  return x;
}

// Which column sits at a place of the tournament in a step.
__device__ __forceinline__ int player(int place, int step, int players) {
  return place == 0 ? 0 : (place - 1 + step) % (players - 1) + 1;
}

// Orthogonalises columns p and q; whether they had to be rotated. A pair that is not there takes part in the sums.
__device__ __forceinline__ bool rotate(double* p, double* q, int n, int member, bool there) {
  double x[kHeld], y[kHeld];
  double a = 0, b = 0, c = 0;
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int i = member + k * kTeam;
    const bool inside = there && i < n;
    x[k] = inside ? p[i] : 0.0;
    y[k] = inside ? q[i] : 0.0;
    a += x[k] * x[k];
    b += y[k] * y[k];
    c += x[k] * y[k];
  }
  a = team_sum(a);
  b = team_sum(b);
  c = team_sum(c);
  if (!(c * c > kOrthogonal * kOrthogonal * a * b)) return false;
  const double zeta = (b - a) / (2 * c);
  const double t = (zeta < 0 ? -1.0 : 1.0) / (fabs(zeta) + sqrt(1 + zeta * zeta));
  const double cosine = 1 / sqrt(1 + t * t), sine = cosine * t;
#pragma unroll
  for (int k = 0; k < kHeld; ++k) {
    const int i = member + k * kTeam;
    if (i < n) {
      p[i] = cosine * x[k] - sine * y[k];
      q[i] = sine * x[k] + cosine * y[k];
    }
  }
  return true;
}

extern "C" __global__ void __launch_bounds__(kMaxThreads, 1)
    gram_eigh(const double* g,  // (batch, n, n), contiguous; the lower triangle is read
              double* values,   // (batch, n), largest first; NaN where G has NaN, no finite norm, or no such form
              double* vectors,  // (batch, n, n), as rows, of entries whose sum is not negative; NaN there too
              int n) {
  extern __shared__ double w[];  // (n, n), columns of W one behind the other; then n lengths
  double* const length = w + n * n;
  const int member = threadIdx.x % kTeam, team = threadIdx.x / kTeam, n_teams = blockDim.x / kTeam;
  const int64 first = static_cast<int64>(blockIdx.x) * n * n;
  double* const mine = values + static_cast<int64>(blockIdx.x) * n;
  const int n_rounds = (n + n_teams - 1) / n_teams;  // of teams over columns

  for (int i = threadIdx.x; i < n * n; i += blockDim.x) {
    const int row = i / n, column = i % n;
    w[i] = row >= column ? g[first + i] : g[first + column * n + row];
  }
  __syncthreads();

  // The largest sum of magnitudes of a column is a norm.
  for (int round = 0; round < n_rounds; ++round) {
    const int column = round * n_teams + team;
    double sum = 0;
    for (int i = member; i < n && column < n; i += kTeam) sum += fabs(w[column * n + i]);
    sum = team_sum(sum);
    if (member == 0 && column < n) length[column] = sum;
  }
  __syncthreads();
  double norm = 0;
  bool finite = true;
  for (int i = 0; i < n; ++i) {
    norm = fmax(norm, length[i]);
    finite = finite && isfinite(length[i]);
  }
  __syncthreads();
  if (!finite) {
    for (int i = threadIdx.x; i < n * n; i += blockDim.x) vectors[first + i] = nan("");
    for (int i = threadIdx.x; i < n; i += blockDim.x) mine[i] = nan("");
    return;
  }
  int exponent = 0;  // over this power of two nothing is out of range, and no bit is lost
  frexp(norm, &exponent);
  const double shift = norm > 0 ? kShift * ldexp(norm, -exponent) : 1.0;
  for (int i = threadIdx.x; i < n * n; i += blockDim.x) w[i] = ldexp(w[i], -exponent) + (i / n == i % n ? shift : 0.0);
  __syncthreads();

  const int players = n + (n & 1), n_pairs = players / 2;
  bool again = n > 1;
  for (int sweep = 0; again && sweep < kSweeps; ++sweep) {
    bool rotated = false;
    for (int step = 0; step < players - 1; ++step) {
      for (int pair = team; pair - team < n_pairs; pair += n_teams) {  // as often for every team of a warp
        const int place = pair < n_pairs ? pair : 0;
        const int i = player(place, step, players), j = player(players - 1 - place, step, players);
        const bool there = pair < n_pairs && i < n && j < n;
        if (rotate(w + i * n, w + j * n, n, member, there)) rotated = true;
      }
      __syncthreads();
    }
    again = __syncthreads_or(rotated);
  }

  bool wrong = again;
  for (int round = 0; round < n_rounds; ++round) {
    const int column = round * n_teams + team;
    const bool there = column < n;
    const double* const v = w + column * n;
    double squares = 0, quotient = 0;
    for (int i = member; i < n && there; i += kTeam) squares += v[i] * v[i];
    const double size = sqrt(team_sum(squares)), inverse = 1 / size;
    for (int i = 0; i < n && there; ++i) {
      const double* const row = g + first + i * n;
      double sum = 0;
      for (int k = member; k <= i; k += kTeam) sum += (k < i ? 2 : 1) * row[k] * (v[k] * inverse);
      quotient += v[i] * inverse * sum;
    }
    quotient = team_sum(quotient);
    // W has |lambda + s| for its singular values: not lambda + s where lambda is below -s.
    if (there && !(fabs(quotient - ldexp(size - shift, exponent)) <= kIndefinite * norm)) wrong = true;
    if (there && member == 0) length[column] = quotient;
  }
  // A quotient that is NaN has no place in an order: slots would stay unwritten.
  if (__syncthreads_or(wrong)) {
    for (int i = threadIdx.x; i < n * n; i += blockDim.x) vectors[first + i] = nan("");
    for (int i = threadIdx.x; i < n; i += blockDim.x) mine[i] = nan("");
    return;
  }
  for (int round = 0; round < n_rounds; ++round) {
    const int column = round * n_teams + team;
    const bool there = column < n;
    const double* const v = w + column * n;
    const double own = there ? length[column] : 0;
    int rank = 0;  // columns that come before this one; of equal ones, those with a smaller index
    double sum = 0, squares = 0;
    for (int i = member; i < n && there; i += kTeam) {
      rank += length[i] > own || (length[i] == own && i < column);
      sum += v[i];
      squares += v[i] * v[i];
    }
    rank = static_cast<int>(team_sum(rank));
    squares = team_sum(squares);
    const double inverse = (team_sum(sum) < 0 ? -1 : 1) / sqrt(squares);
    if (member == 0 && there) mine[rank] = own;
    for (int i = member; i < n && there; i += kTeam) {
      vectors[first + static_cast<int64>(rank) * n + i] = v[i] * inverse;
    }
  }
}

}  // namespace balanced_rep
